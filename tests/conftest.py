"""What every test shares: few threads, and GPU tests skipped in one place."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from packaging.version import Version

from kvarena.harness.paths import ROOT
from kvarena.kernels.threads import set_compute_threads

sys.path.append(str(Path(__file__).parent))  # `made_data` and `mutants` are no tests, and imported by their names
import made_data

set_compute_threads(1)

# A busy machine is no reason to fail: hypothesis would time every example. One commit gives one answer: the examples
# are the same each time, but for HYPOTHESIS_RANDOM=1, which looks for new ones.
settings.register_profile(
    "untimed",
    deadline=None,
    derandomize=not os.environ.get("HYPOTHESIS_RANDOM"),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu`, with a reason, where torch sees no CUDA GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU; torch sees none here"))


@pytest.fixture
def interpreted() -> Callable[[Path], None]:
    """Runs a file of tests in Triton's interpreter: in a process of its own, for Triton chooses when it is imported."""
    triton = pytest.importorskip("triton")
    if Version(triton.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.4"):
        pytest.skip("the interpreter of Triton before 3.7 needs numpy before 2.4")

    def run(script: Path) -> None:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(script)],
            env=os.environ | {"TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    return run


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """Finds a file of the data folder beside the checkout (or in KVARENA_SHARED); skips where it is absent."""
    folder = Path(os.environ.get("KVARENA_SHARED", ROOT.parent / "shared"))

    def find(name: str) -> Path:
        if not (folder / name).is_file():
            pytest.skip(f"{folder / name} is absent: real traces are not part of the project")
        return folder / name

    return find


@pytest.fixture(scope="session", params=["made", "real"])
def data_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Finds a file of lengths: one of our own making in its format, and that of `shared`, one after the other."""
    if request.param == "real":
        real: Callable[[str], Path] = request.getfixturevalue("shared")
        return lambda name: real(f"data/{name}")
    folder = tmp_path_factory.mktemp("made")
    return cache(lambda name: made_data.write(folder, name))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer's folder."""
    return made_data.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
