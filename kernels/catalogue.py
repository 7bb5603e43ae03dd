"""The kernels there are: what the files of this folder say of them, read from their text.

A kernel is one file. Its class says `spec = KernelSpec(...)`, of literals and of what `spec.py` has names for: so what
there is to choose from is known without importing torch, numba or any kernel's library.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

from kvarena.errors import UserError, does_not_run
from kvarena.kernels import spec as words
from kvarena.kernels.spec import KernelSpec

Entry = tuple[KernelSpec, str, str]  # what it can read, module, class


def scanned(folder: Path, package: str) -> dict[str, Entry]:
    """Name -> kernel, sorted by name. Raises UserError for a name taken twice, and for a spec that cannot be read."""
    found: dict[str, Entry] = {}
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text()
        if "= KernelSpec(" not in text:
            continue
        module = ".".join((package, *path.relative_to(folder).with_suffix("").parts))
        for kernel_class, stated in _specs(path, text):
            entry = (_read(stated, path), module, kernel_class)
            name = entry[0].name
            if name in found:
                raise UserError(f"{path.resolve()}: kernel {name} is there already, in {found[name][1]}")
            found[name] = entry
    return dict(sorted(found.items()))


def _specs(path: Path, text: str) -> Iterator[tuple[str, ast.expr]]:
    """Classes of a file that state a spec, and what they state."""
    try:
        module = ast.parse(text, str(path))
    except SyntaxError as error:
        raise does_not_run(path, error) from error
    for node in (each for each in module.body if isinstance(each, ast.ClassDef)):
        for line in node.body:
            if isinstance(line, ast.Assign | ast.AnnAssign) and line.value:
                target = line.targets[0] if isinstance(line, ast.Assign) else line.target
                if ast.unparse(target) == "spec":
                    yield node.name, line.value


def _read(stated: ast.expr, path: Path) -> KernelSpec:
    try:
        spec: KernelSpec = eval(compile(ast.Expression(stated), str(path), "eval"), dict(vars(words)))
    except (NameError, TypeError, AttributeError) as error:
        told = f"{path.resolve()}:{stated.lineno}: {error}; a spec is made of literals and of names of kernels/spec.py"
        raise UserError(told) from error
    return spec


CATALOGUE = scanned(Path(__file__).parent, __package__)
