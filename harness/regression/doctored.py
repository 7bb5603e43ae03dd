"""A copy of this tree that is slower on purpose: what the gate is tried on, by its tests and its benchmark."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from kvarena.harness.paths import ROOT

SLOWED = "paged policy, batch step"  # the benchmark that should name the culprit
_CODE = ("kernels", "allocators", "harness", "kvarena", ".import")
_SLOWER = """

def _twice_as_long(method):
    from time import perf_counter

    def slow(*arguments):
        start = perf_counter()
        result = method(*arguments)
        end = 2 * perf_counter() - start
        while perf_counter() < end:
            pass
        return result

    return slow


for _name in {methods}:
    setattr(PagedPolicy, _name, _twice_as_long(getattr(PagedPolicy, _name)))
"""


def copy_of_tree(folder: Path) -> Path:
    """This tree's code, as it is; returns `folder`."""
    for name in _CODE:
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def slower_tree(
    folder: Path, methods: Sequence[str] = ("admit", "grow_each", "usage", "drain", "look_ahead", "release")
) -> Path:
    """A copy in which each of these methods of PagedPolicy takes twice its time."""
    paged = copy_of_tree(folder) / "allocators" / "paged" / "policy.py"
    paged.write_text(paged.read_text() + _SLOWER.format(methods=list(methods)))
    return folder
