"""Expressions: what they yield, and that nothing but the small language gets through."""

import pytest

from kvarena.errors import UserError
from kvarena.harness.scorecard.expression import Point, evaluate


def look_up(point: Point) -> float:
    return {"a": 6.0, "b": 3.0}[point.system] + (point.x or 0.0)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("q('f','p','a','v')/q('f','p','b','v')", 2.0),
        ("100*(q('f','p','a','v',4)-1)", 900.0),
        ("max(q('f','p','a','v',x) for x in (1,2,3))", 9.0),
        ("max([q('f','p','a','v',x) for x in (1,2)]+[q('f','p','b','v',x) for x in (9,)])", 12.0),
        ("max(max(a/b,b/a) for a,b in ((q('f','p','b','v',k),q('f','p','a','v',k)) for k in (0,3)))", 2.0),
        ("sum(q('f',p,'b','v')<q('f',p,'a','v')<=6 for p in ('p','r'))", 2.0),
        ("-2*40", -80.0),
    ],
)
def test_a_value(expression, value):
    assert evaluate(expression, look_up) == value


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "open('/etc/passwd')",
        "().__class__",
        "q.__globals__",
        "(lambda: 1)()",
        "[x for x in (1,)][0]",
        "9**9**9",
        "q(*(1,2))",
        "max((1,2), key=q)",
        "f'{q}'",
        "x",
        "True",
        "(q := 1)",
        "1 +",
        "1; 2",
        "",
    ],
)
def test_everything_else_is_refused_before_anything_is_asked(expression):
    def never(point: Point) -> float:
        raise AssertionError(f"asked for {point}")

    with pytest.raises(UserError, match="expression"):
        evaluate(expression, never)
