"""What runs on a GPU, run here: the real bindings over a libcuda.so.1 of ours, whose memory is the host's.

One child process finds the shim through LD_LIBRARY_PATH. In it `torch_on_shim.py` tells torch that there is a GPU, and
`executed.py` notes which statements run. It runs the tests that are marked gpu, as they are, and those of this folder
whose names begin with `shimmed`. What a shim cannot show: time, what runs beside what, and what the real driver does
where its documentation is silent.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from executed import not_executed
from shim import COMPILER, build, environment

from kvarena.harness.paths import ROOT

pytest.importorskip("cuda.bindings")
pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler, to build the shim of libcuda")

HERE = Path(__file__).parent
ALLOCATORS = ROOT / "tests" / "allocators"
MARKED_GPU = ["vmm", "memory", "test_stores_cuda.py", "test_sharing.py"]
SHIMMED = [
    "shimmed_addresses.py",
    "shimmed_failures.py",
    "shimmed_kernels.py",
    "shimmed_misuse.py",
    "shimmed_map_runs.py",
    "shimmed_serving.py",
]
NOT_HERE = [
    "test_a_fence_waits_for_what_was_launched_and_no_more",  # kernels run beside the host
    "test_pools_of_a_gpu_are_the_gpus_bytes",  # 2 GB of the host's memory
]
LEAST = 0.95  # of the statements


@pytest.fixture(scope="module")
def child(tmp_path_factory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """All that runs on the shim, and which statements did."""
    folder = tmp_path_factory.mktemp("cuda_shim")
    record = folder / "executed.json"
    told = environment(build(folder)) | {"EXECUTED": str(record)}
    plugins = ["-p", "executed", "-p", "torch_on_shim", "-p", "no:cacheprovider"]
    files = [*(ALLOCATORS / name for name in MARKED_GPU), *(HERE / name for name in SHIMMED)]
    left_out = " and ".join(f"not {name}" for name in NOT_HERE)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", *plugins, "-m", "gpu", "-k", left_out, *files],
        cwd=ROOT, env=told, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done, record


def test_what_runs_on_a_gpu_runs_on_the_shim(child):
    done, _ = child
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


def test_hardly_a_statement_is_left_out(child):
    _, record = child
    found = not_executed(record)
    statements = sum(count for count, _ in found.values())
    missing = {name: lines for name, (_, lines) in found.items() if lines}
    assert 1 - sum(map(len, missing.values())) / statements >= LEAST, missing
