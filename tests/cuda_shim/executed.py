"""A pytest plugin: which statements of some files run, written to the file that EXECUTED names.

To be loaded before the files are imported: `-p executed` comes first.
"""

import ast
import json
import os
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "allocators"
FILES = [
    "vmm/cuda.py", "vmm/cuda_context.py", "vmm/driver.py", "vmm/tensor.py",
    "vattention/store.py", "vattention/kernel_fence.py", "paged/store.py", "paged/batch_table.py",
    "paged/swap_space.py", "paged/block_copies.py", "reservation/store.py", "stores.py",
    "memory/resident_store.py", "memory/device_view.py", "memory/staging.py", "memory/byte_copies.py",
    "memory/triton_copies.py",
]  # fmt: skip
THE_HOSTS_ALONE = {"BlockTable", "_HostCopies", "_host_loop"}

_lines: dict[str, set[int]] = defaultdict(set)  # by file
_known: dict[CodeType, str | None] = {}  # code -> the file of ours that it is of


def _of_ours(code: CodeType) -> str | None:
    if code not in _known:
        path = Path(code.co_filename).resolve()
        name = str(path.relative_to(FOLDER)) if path.is_relative_to(FOLDER) else None
        _known[code] = name if name in FILES else None
    return _known[code]


def _on_call(frame: FrameType, event: str, argument: object):
    name = _of_ours(frame.f_code)
    if name is None:
        return None
    lines = _lines[name]

    def on_line(frame: FrameType, event: str, argument: object):
        lines.add(frame.f_lineno)
        return on_line

    return on_line


def statements(name: str) -> Iterator[range]:
    """Lines of every statement but docstrings; of a compound one, those before its body."""
    nodes: list[ast.AST] = [ast.parse((FOLDER / name).read_text())]
    while nodes:
        node = nodes.pop()
        if getattr(node, "name", None) in THE_HOSTS_ALONE:
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.stmt) and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            body = getattr(node, "body", None)
            end = body[0].lineno if body else node.end_lineno + 1
            yield range(node.lineno, max(end, node.lineno + 1))


def not_executed(record: Path) -> dict[str, tuple[int, list[int]]]:
    """By file: how many statements there are, and where those begin that never ran."""
    lines = {name: set(numbers) for name, numbers in json.loads(record.read_text()).items()}
    found = {}
    for name in FILES:
        every = list(statements(name))
        found[name] = len(every), [at.start for at in every if not lines.get(name, set()) & set(at)]
    return found


def pytest_unconfigure() -> None:
    """Write what has run."""
    sys.settrace(None)
    Path(os.environ["EXECUTED"]).write_text(json.dumps({name: sorted(lines) for name, lines in _lines.items()}))


if "EXECUTED" in os.environ:  # watch from here on, in every thread
    threading.settrace(_on_call)
    sys.settrace(_on_call)
