"""Which files a case uses, and their hash: what has passed under the same files is not run again.

Imports are followed as they are written, those inside functions too. What is reached by name (an experiment, a kernel,
a file of tests) a step tells itself.
"""

import ast
import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from kvarena.experiments.gpu_validation.step import Step
from kvarena.harness.paths import ROOT


def code_of(step: Step, case: str) -> str:
    """Hash of the files that a case uses, in twelve digits."""
    digest = hashlib.sha256()
    for path in files_of((step.module, *step.uses(case))):
        digest.update(f"{path.relative_to(ROOT)} {_digest(path)}\n".encode())
    return digest.hexdigest()[:12]


@cache
def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files_of(names: Iterable[str]) -> list[Path]:
    """Files of modules, files and folders, and all that they import of ours, sorted."""
    found: set[Path] = set()
    left = [path for name in names for path in _paths(name)]
    while left:
        path = left.pop()
        if path not in found:
            found.add(path)
            left += _imported_by(path)
    return sorted(found)


def _paths(name: str) -> list[Path]:
    """Files of ours that a dotted name, or a path in the checkout, stands for."""
    path = ROOT / name
    if path.is_dir():
        return [each for each in path.rglob("*") if each.is_file() and "__pycache__" not in each.parts]
    if path.is_file():
        return [path]
    module = _module(name)
    return [] if module is None else [module]


def _module(name: str) -> Path | None:
    """The file of a module of ours; links lead from kvarena/ to the folders."""
    file = (ROOT / name.replace(".", "/")).with_suffix(".py")
    return file.resolve() if name.startswith("kvarena.") and file.is_file() else None


@cache
def _imported_by(path: Path) -> tuple[Path, ...]:
    if path.suffix != ".py":
        return ()
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_bytes(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return tuple(file for name in names if (file := _module(name)))
