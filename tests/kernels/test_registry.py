"""Kernels by name: which exist, which can run here, what they can read, and what is said where they cannot."""

import re
from dataclasses import replace
from importlib import import_module

import pytest

from kvarena.errors import UserError
from kvarena.kernels import registry
from kvarena.kernels.catalogue import CATALOGUE, scanned
from kvarena.kernels.layout import Layout
from kvarena.kernels.registry import fits, get_kernel, kernel_spec, missing

NUMBA = kernel_spec("numba")


def test_every_kernel_has_a_class_that_says_the_same_of_it():
    for name, (spec, module, kernel_class) in CATALOGUE.items():
        assert spec.name == name
        if "cpu" in spec.devices:
            assert getattr(import_module(module), kernel_class).spec == spec


def test_a_kernel_is_one_file_which_is_not_run_to_know_it(tmp_path):
    mine = tmp_path / "mine.py"
    stated = "name='mine', body='mine', library='-', layouts=frozenset(Layout), devices=CPU, dtypes={}"
    text = f"raise SystemExit\n\nclass Mine:\n    spec = KernelSpec({stated})\n"
    mine.write_text(text.format("ANY_DTYPE"))
    spec, module, kernel_class = scanned(tmp_path, "own")["mine"]
    assert (spec.dtypes, module, kernel_class) == (NUMBA.dtypes | {"float16"}, "own.mine", "Mine")
    (tmp_path / "twice.py").write_text(mine.read_text())
    with pytest.raises(UserError, match=r"twice\.py: kernel mine .*own\.mine"):
        scanned(tmp_path, "own")
    mine.write_text("class (Mine:\n" + text)
    with pytest.raises(UserError, match=r"mine\.py:1: .*syntax"):
        scanned(tmp_path, "own")
    mine.write_text(text.format("numpy.float16"))
    with pytest.raises(UserError, match=r"mine\.py:4: .*numpy.*spec\.py"):
        scanned(tmp_path, "own")


def test_an_unknown_kernel_is_refused_with_those_that_exist():
    with pytest.raises(UserError, match=r"no such kernel.*numba, sdpa, torch_flash"):
        get_kernel("nunba")


def test_a_kernel_without_its_library_is_refused_with_a_hint(monkeypatch):
    absent = replace(NUMBA, requires=("no_such_module",), install_hint="pip install it")
    monkeypatch.setitem(registry.CATALOGUE, "numba", (absent, "never", "imported"))
    with pytest.raises(UserError, match=r"kernel=numba: .*no_such_module.*pip install it"):
        get_kernel("numba")


def test_a_kernel_that_cannot_be_imported_or_lacks_a_method_is_refused(monkeypatch):
    monkeypatch.setitem(registry.CATALOGUE, "mine", (NUMBA, "kvarena.kernels.no_such_file", "Mine"))
    with pytest.raises(UserError, match=r"no_such_file\.py: ModuleNotFoundError"):
        get_kernel("mine")
    monkeypatch.setitem(registry.CATALOGUE, "mine", (NUMBA, "kvarena.kernels.kernel", "AttentionKernel"))
    with pytest.raises(UserError, match="lacks decode, prefill"):
        get_kernel("mine")


def test_flex_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setattr(registry, "which", lambda _: None)
    assert "C++ compiler" in missing(kernel_spec("flex"))
    with pytest.raises(UserError, match=re.escape("needs a C++ compiler")):
        get_kernel("flex")


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"layout": Layout.PAGED}, None),
        ({"layout": Layout.PAGED, "device": "cuda"}, "runs on cpu, not cuda"),
        ({"layout": Layout.PAGED, "dtype": "float16"}, "reads bfloat16, float32, not float16"),
        ({"layout": Layout.PAGED, "head_size": 100}, "head sizes 16, 32, .*, not 100"),
        ({"layout": Layout.PAGED, "block_size": 48}, "block sizes 16, 32, not 48"),
        ({"layout": Layout.CONTIGUOUS, "block_size": 48}, None),  # a row has no block size
    ],
)
def test_reasons(asked, reason):
    spec = replace(NUMBA, block_sizes=frozenset({16, 32}))
    found = fits(spec, **asked)
    assert found == reason if reason is None else re.fullmatch(reason, found)
