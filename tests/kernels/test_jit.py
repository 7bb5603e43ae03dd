"""Where machine code is kept, and how many threads run it."""

import os

import pytest

from kvarena.kernels import jit, threads
from kvarena.kernels.numba_attention import NumbaAttention


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package in which to edit; the cache looks at it and at an empty home."""
    (tmp_path / "home").mkdir()
    source = tmp_path / "kernels"
    source.mkdir()
    (source / "body.py").write_text("import numba\nx = 1\n")
    (source / "other.py").write_text("x = 1\n")
    monkeypatch.setattr(jit, "_PACKAGE", source)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    jit.cache_folder.cache_clear()
    yield source
    jit.cache_folder.cache_clear()


def test_an_edit_of_any_jitted_file_changes_the_folder(package):
    before = jit.cache_folder()
    assert before.parent == package / "__pycache__"
    (package / "other.py").write_text("x = 2\n")
    jit.cache_folder.cache_clear()
    assert jit.cache_folder() == before
    (package / "body.py").write_text("import numba\nx = 2\n")
    jit.cache_folder.cache_clear()
    assert jit.cache_folder() != before


def test_every_jitted_file_is_seen():
    """Each module that the numba kernels compile code from."""
    jitted = {path.name for path in jit._PACKAGE.glob("*.py") if jit._JITTED.search(path.read_bytes())}
    assert jitted >= {
        "simd.py",
        "jit.py",
        "attention_tile.py",
        "addressing.py",
        "numba_attention.py",
        "numba_append.py",
    }


def test_a_read_only_package_caches_in_the_home_folder(package):
    (package / "__pycache__").write_text("in the way, which also stops root")
    assert jit.cache_folder().is_relative_to(package.parent / "home")


def test_without_a_home_folder_it_caches_in_a_temporary_one(package):
    for path in (package / "__pycache__", package.parent / "home" / ".cache"):
        path.write_text("in the way")
    folder = jit.cache_folder()
    assert folder.is_dir()
    assert not folder.is_relative_to(package.parent / "home")
    os.rmdir(folder)


def test_small_machines_compute_with_one_thread(monkeypatch):
    for cores, expected in ((1, 1), (2, 1), (3, 3), (16, 16)):
        monkeypatch.setattr(threads, "usable_cores", lambda cores=cores: cores)
        assert threads.default_threads() == expected


def test_the_kernel_runs_serial_code_for_one_thread(monkeypatch, arrange, run):
    from kvarena.kernels import numba_attention
    from kvarena.kernels.random_batch import Shapes

    monkeypatch.setattr(threads, "compute_threads", lambda: 1)
    monkeypatch.setattr(numba_attention, "_decode_kernels", (numba_attention._decode_kernels[0], None))
    run(NumbaAttention(), arrange("rows", Shapes(), [5]))
