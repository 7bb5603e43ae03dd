"""Imports run downward only: kernels < allocators < harness < experiments."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = ["kernels", "allocators", "harness", "experiments"]
LAYOUT_CONTRACT = {"kvarena.kernels.layout", "kvarena.kernels.view"}


def imported_modules(source: str) -> set[str]:
    """Dotted names a file imports; `from a.b import c` counts as a.b and a.b.c, since c may be a module."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the package they reach into"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def packages_of(names: set[str]) -> set[str]:
    return {parts[1] for parts in (name.split(".") for name in names) if parts[0] == "kvarena" and parts[1:]}


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", ORDER)
def test_imports_run_downward(package):
    allowed = {*ORDER[: ORDER.index(package) + 1], "errors", "caches", "cgroups", "__version__"}
    upward = {
        path.relative_to(ROOT).as_posix(): packages_of(imported_modules(path.read_text())) - allowed
        for path in files(package)
    }
    assert files(package)
    assert not {path: names for path, names in upward.items() if names}


def folder_of(module: str) -> str:
    """The folder of ours that a module stands in, as a dotted name."""
    path = ROOT.joinpath(*module.split(".")[1:])
    return module if path.is_dir() else module.rpartition(".")[0]


def test_no_two_folders_import_one_another():
    """But for the top of allocators/: it holds the contract that its folders import, and the registry of them."""
    below: dict[str, set[str]] = {}
    for package in ORDER:
        for path in files(package):
            here = ".".join(("kvarena", *path.parent.relative_to(ROOT).parts))
            known = {name for name in imported_modules(path.read_text()) if is_ours(name)}
            below.setdefault(here, set()).update(folder_of(name) for name in known if folder_of(name) != here)
    below = {here: set(others) - {"kvarena.allocators"} for here, others in below.items()}
    with pytest.raises(CycleError):  # it can fail
        TopologicalSorter(below | {"kvarena.kernels": {"kvarena.experiments.command"}}).prepare()
    TopologicalSorter(below).prepare()


def is_ours(name: str) -> bool:
    """Whether it is a module of one of the four folders."""
    path = ROOT.joinpath(*name.split(".")[1:])
    return name.count(".") > 1 and name.startswith("kvarena.") and path.with_suffix(".py").is_file()


def test_allocators_see_only_the_layout_contract_of_kernels():
    for path in files("allocators"):
        names = {name for name in imported_modules(path.read_text()) if name.startswith("kvarena.kernels.")}
        strangers = {name for name in names if not any(f"{name}.".startswith(f"{known}.") for known in LAYOUT_CONTRACT)}
        assert not strangers, f"{path}: {strangers}"


def test_policies_and_specs_need_no_torch():
    """A modelled replay, a configuration and a refusal must not wait for torch to load."""
    code = (
        "import sys\n"
        "from kvarena.allocators.registry import allocator_names, config_class\n"
        "from kvarena.kernels.registry import kernel_names, kernel_spec\n"
        "assert [config_class(name) for name in allocator_names()] and [kernel_spec(name) for name in kernel_names()]\n"
        "sys.exit('torch' in sys.modules)"
    )
    environment = {"PYTHONPATH": str(ROOT / ".import"), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_is_imported_by_the_name_of_its_folder():
    """`kernels` alone is another distribution; ours is `kvarena.kernels`."""
    for package in [*ORDER, "tests", "benchmarks"]:
        for path in files(package):
            tops = {name.split(".")[0] for name in imported_modules(path.read_text())}
            assert not tops & set(ORDER), f"{path} imports {tops & set(ORDER)}"


def test_the_check_sees_every_form_of_import():
    source = "import kvarena.harness.run.run\ndef f():\n    from kvarena import experiments\n"
    assert packages_of(imported_modules(source)) == {"harness", "experiments"}


@pytest.mark.parametrize("package", [*ORDER, "tests"])
def test_a_folder_can_be_taken_in_at_one_look(package):
    """At most 25 files of code: a reader guesses the file from the names that stand beside one another."""
    folders = {path.parent for path in files(package)}
    crowded = {f.relative_to(ROOT).as_posix(): len(list(f.glob("*.py"))) for f in folders}
    assert not {name: count for name, count in crowded.items() if count > 25}
