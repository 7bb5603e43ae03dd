"""Benchmarks are run by hand: what they import must be there."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from kvarena.harness.paths import ROOT


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_a_benchmark_imports(path: Path) -> None:
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    spec.loader.exec_module(module_from_spec(spec))
