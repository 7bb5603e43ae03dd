"""Claims are expressions over `q(figure, panel, system, quantity, x)`, the same on the published side and on ours.

A small part of Python is understood: numbers, texts, tuples and lists, + - * /, comparisons (also chained: a < b < c),
comprehensions over such things, q, min, max and sum. Everything else is refused before anything is evaluated.
"""

import ast
from collections.abc import Callable
from functools import cache
from types import CodeType
from typing import NamedTuple

from kvarena.errors import UserError

_FUNCTIONS = {"min": min, "max": max, "sum": sum}
_LOOK_UP = "q"
_ALLOWED = (
    ast.Expression, ast.Constant, ast.Tuple, ast.List, ast.Name, ast.Load, ast.Store, ast.Call,
    ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.UnaryOp, ast.USub,
    ast.Compare, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.GeneratorExp, ast.ListComp, ast.comprehension,
)  # fmt: skip


class Point(NamedTuple):
    """What `q` is asked for: one value of one figure. `x` is None where the quantity has none."""

    figure: str
    panel: str
    system: str
    quantity: str
    x: float | None = None


def evaluate(expression: str, look_up: Callable[[Point], float]) -> float:
    """The expression's value. Raises UserError for what is no such expression; what `look_up` raises passes."""
    code = _checked(expression)
    names = {_LOOK_UP: lambda *point: look_up(Point(*point)), **_FUNCTIONS}
    return float(eval(code, {"__builtins__": {}, **names}))


def points_of(expression: str) -> list[Point]:
    """What an expression asks `q` for."""
    asked: dict[Point, None] = {}

    def note(point: Point) -> float:
        asked[point] = None
        return float(len(asked))  # all different, so that no difference of two is zero

    evaluate(expression, note)
    return list(asked)


@cache
def _checked(expression: str) -> CodeType:
    """The compiled expression, once every node of it is known to be allowed."""
    try:
        tree = ast.parse(expression, mode="eval")
    except SyntaxError as error:
        raise UserError(f"expression {expression!r}: {error.msg}") from error
    variables = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    known = {_LOOK_UP, *_FUNCTIONS} | variables  # only a comprehension can store
    for node in ast.walk(tree):
        if not isinstance(node, _ALLOWED):
            raise _refusal(expression, type(node).__name__)
        if isinstance(node, ast.Name) and node.id not in known:
            raise _refusal(expression, node.id)
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and not node.keywords):
            raise _refusal(expression, ast.unparse(node))
        if isinstance(node, ast.Constant) and type(node.value) not in (int, float, str):
            raise _refusal(expression, repr(node.value))
    return compile(tree, "<claim>", "eval")


def _refusal(expression: str, what: str) -> UserError:
    return UserError(
        f"expression {expression!r}: {what} is not allowed. Allowed are numbers, texts, tuples, lists, + - * /, "
        f"comparisons, comprehensions, and the functions {', '.join([_LOOK_UP, *_FUNCTIONS])}"
    )
