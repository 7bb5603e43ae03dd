"""The lock files, and a package whose folder `kernels` must never pass for the distribution of that name."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ["requirements.lock", "requirements-dev.lock"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(lock: str) -> dict[str, Requirement]:
    """Pins of a lock file by name; comments and the include of the other lock are left out."""
    lines = [line for line in (ROOT / lock).read_text().splitlines() if line and not line.startswith(("#", "-r "))]
    parsed = [Requirement(line) for line in lines]
    assert len({pin.name for pin in parsed}) == len(parsed), "a name is pinned twice"
    return {pin.name: pin for pin in parsed}


@pytest.mark.parametrize("lock", LOCKS)
def test_locks_pin_exact_public_versions(lock):
    text = (ROOT / lock).read_text()
    assert "+" not in text  # no local version: `+cpu` exists in no public index
    assert "--hash" not in text
    assert "nvidia" not in text  # torch's CUDA build pins what it needs
    for pin in pins(lock).values():
        assert re.fullmatch(r"==[0-9][^*,]*", str(pin.specifier)), pin


def test_torch_is_pinned_once():
    assert str(pins("requirements.lock")["torch"].specifier) == "==2.13.0"
    assert not pins("requirements.lock").keys() & pins("requirements-dev.lock").keys()
    assert "-r requirements.lock" in (ROOT / "requirements-dev.lock").read_text().splitlines()


@pytest.mark.parametrize(
    ("locks", "needs"),
    [(LOCKS[:1], PROJECT["dependencies"]), (LOCKS, PROJECT["optional-dependencies"]["dev"])],
    ids=["runtime", "dev"],
)
def test_locks_satisfy_pyproject(locks, needs):
    locked = {name: pin for lock in locks for name, pin in pins(lock).items()}
    for need in map(Requirement, needs):
        pin = locked[canonicalize_name(need.name)]
        version = str(pin.specifier).removeprefix("==")
        assert need.specifier.contains(version), f"{pin} does not satisfy {need}"


def test_locks_leave_room_for_every_extra():
    """An extra installed on top of the lock must not move a pin that pyproject.toml speaks about."""
    locked = {name: pin for lock in LOCKS for name, pin in pins(lock).items()}
    for extra, needs in PROJECT["optional-dependencies"].items():
        for need in map(Requirement, needs):
            if pin := locked.get(canonicalize_name(need.name)):
                assert need.specifier.contains(str(pin.specifier).removeprefix("==")), f"{extra}: {need}, {pin}"


def in_subprocess(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    """Run code in the root with the package importable as run.sh makes it, and `path` ahead of it."""
    pythonpath = os.pathsep.join(map(str, [*path, ROOT / ".import"]))
    environment = {**os.environ, "PYTHONPATH": pythonpath, "PYTHONSAFEPATH": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def kernels_distribution(tmp_path):
    """Metadata, and nothing but metadata, of a distribution `kernels` in the range that transformers accepts."""
    needs = [Requirement(line) for line in requires("transformers") or ()]
    accepted = next(need.specifier for need in needs if need.name == "kernels")
    lowest = next(bound.version for bound in accepted if bound.operator == ">=")
    metadata = tmp_path / f"kernels-{lowest}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {lowest}\n")
    return tmp_path


USE_TRANSFORMERS = """
import importlib.util
import kvarena.kernels
from transformers import LlamaForCausalLM
found = importlib.util.find_spec("kernels")
assert found is None, found
"""


def test_transformers_imports_beside_a_distribution_named_kernels(kernels_distribution):
    done = in_subprocess(USE_TRANSFORMERS, kernels_distribution)
    assert done.returncode == 0, done.stderr


def test_with_the_root_on_the_path_transformers_does_not_import(kernels_distribution):
    """What the set-up guards against; if this passes one day, the guard can go."""
    done = in_subprocess("from transformers import LlamaForCausalLM", kernels_distribution, ROOT)
    assert done.returncode != 0
    assert "from 'kernels'" in done.stderr
