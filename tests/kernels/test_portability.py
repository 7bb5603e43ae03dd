"""Which pairs fit, and what is said about those that do not."""

import re
from dataclasses import replace
from importlib import import_module

import pytest
from rich.console import Console

from kvarena.errors import UserError
from kvarena.harness.paths import CONF
from kvarena.kernels import registry
from kvarena.kernels.catalogue import CATALOGUE, FLEX, NUMBA, SDPA
from kvarena.kernels.layout import Layout
from kvarena.kernels.portability import check, matrix, render
from kvarena.kernels.registry import fits, get_kernel, kernel_spec, missing

ALLOCATORS = {"static": Layout.CONTIGUOUS, "paged": Layout.PAGED, "vattention": Layout.CONTIGUOUS}


def test_every_kernel_has_a_class_and_a_configuration():
    configured = {path.stem for path in (CONF / "kernel").glob("*.yaml")} - {"all"}
    assert configured == set(CATALOGUE)
    for name, (spec, module, kernel_class) in CATALOGUE.items():
        assert spec.name == name
        if "cpu" in spec.devices:
            assert getattr(import_module(module), kernel_class).spec is spec


def test_an_unknown_kernel_is_refused_with_those_that_exist():
    with pytest.raises(UserError, match=r"no such kernel.*numba, sdpa, gather_sdpa"):
        get_kernel("nunba")


def test_a_kernel_without_its_library_is_refused_with_a_hint(monkeypatch):
    absent = replace(NUMBA, requires=("no_such_module",), install_hint="pip install it")
    monkeypatch.setitem(registry.CATALOGUE, "numba", (absent, "never", "imported"))
    with pytest.raises(UserError, match="kernel=numba: needs no_such_module, not installed; pip install it"):
        get_kernel("numba")


def test_flex_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setattr(registry, "which", lambda _: None)
    assert "C++ compiler" in missing(FLEX)
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


def test_virtually_contiguous_memory_takes_every_kernel_that_static_memory_takes():
    """The claim of vAttention; paging costs the kernels that read rows."""
    pairs = matrix(ALLOCATORS)
    taken = {name: {p.kernel for p in pairs if p.allocator == name and p.reason is None} for name in ALLOCATORS}
    assert taken["vattention"] == taken["static"] > {"sdpa"}
    assert "sdpa" not in taken["paged"]


def test_a_pair_that_does_not_fit_is_refused_with_the_pairs_that_do():
    pairs = matrix(ALLOCATORS, kernels=("numba", "sdpa"))
    check(pairs, "static", "sdpa")
    with pytest.raises(UserError) as refused:
        check(pairs, "paged", "sdpa")
    assert "sdpa reads contiguous, not paged" in str(refused.value)
    assert str(refused.value).endswith(
        "static + numba, static + sdpa, paged + numba, vattention + numba, vattention + sdpa"
    )


def test_block_sizes_are_asked_of_paged_allocators():
    assert [p.reason for p in matrix({"paged": Layout.PAGED}, ("numba",), block_sizes={"paged": 3})] == [None]
    assert kernel_spec("sdpa") is SDPA


def test_the_matrix_shows_every_reason():
    console = Console(width=200, record=True)
    console.print(render(matrix(ALLOCATORS, kernels=("numba", "sdpa", "gather_sdpa"))))
    text = console.export_text()
    assert text.count("yes") == 6
    assert text.count("no: reads contiguous, not paged") == 1
    assert text.count("no: reads paged, not contiguous") == 2
