"""Both plans of the validation on a GPU, rehearsed over the shim: the real session, the real steps, at small sizes.

What cannot run there says so by name, and nothing else may fail: a step that breaks is found here, not by the GPU.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from shim import COMPILER, build, environment

from kvarena.experiments.gpu_validation.plan import ALL, ENVIRONMENT, PLANS, each_once
from kvarena.experiments.gpu_validation.record import Record, Result, latest, read
from kvarena.harness.paths import ROOT

pytest.importorskip("cuda.bindings")
pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler, to build the shim of libcuda")

HERE = Path(__file__).parent
SECONDS = 300.0  # of a plan
ASSUMED = {(row.step.name, case): row.case_s for row, cases in each_once(ALL, "cuda") for case in cases}
NO_FLASH = "Could not run 'aten::_flash_attention_forward'"
FILES = {"validation.jsonl", "matrix.md", "environment.json", "log.txt", "kept.tar.xz"}


@pytest.fixture(scope="module")
def rehearse(tmp_path_factory):
    """Run a plan into a folder; the records that this session added."""
    told = environment(build(tmp_path_factory.mktemp("shim")))

    def run(out: Path, *arguments: str) -> list[Record]:
        known = len(read(out / "validation.jsonl"))
        command = [sys.executable, "-P", str(HERE / "rehearsal.py"), "--out", str(out), *arguments]
        done = subprocess.run(command, cwd=ROOT, env=told, capture_output=True, text=True, check=False)
        records = read(out / "validation.jsonl")[known:]
        assert records, done.stdout + done.stderr
        return records

    return run


@pytest.fixture(scope="module")
def sessions(rehearse, tmp_path_factory) -> tuple[Path, list[list[Record]]]:
    """Plan 1, then plan 2 in the same folder."""
    out = tmp_path_factory.mktemp("rehearsed")
    return out, [rehearse(out, "--plan", str(plan)) for plan in PLANS]


def planned(plan: int) -> list[tuple[str, str]]:
    return [(row.step.name, case) for row, cases in each_once(PLANS[plan], "cuda") for case in cases]


def expected(step: str, case: str) -> tuple[Result, str]:
    """What a case comes to over the shim, and how its reason begins."""
    if step != ENVIRONMENT.step.name and case.startswith("fa3"):
        return Result.NOT_RUN, "needs vllm, not installed"
    if (step, case) == ("kernels", "torch_flash, rows"):  # torch's own operator, in a torch that has no GPU
        return Result.FAILED, f"NotImplementedError: {NO_FLASH}"
    return Result.PASSED, ""


def test_every_case_runs_or_says_what_it_lacks(sessions):
    _, (one, two) = sessions
    assert [record.key for record in one] == planned(1)
    assert [record.key for record in two if record.key not in planned(1)] == planned(2)[1:]
    for record in one + two:
        result, reason = expected(*record.key)
        assert record.result is result, f"{record.step}: {record.case}: {record.result}: {record.reason}"
        assert record.reason.startswith(reason), record.reason
        left_out = [(of, why) for of, why in record.values.items() if of.endswith("not measured")]
        assert all(of.startswith("torch_flash") and NO_FLASH in why for of, why in left_out), left_out


def test_what_passed_is_not_run_again(sessions):
    """But for the environment, which every session looks at."""
    _, (one, two) = sessions
    passed = {record.key for record in one if record.result is Result.PASSED} - {("environment", "machine")}
    assert not passed & {record.key for record in two}


def test_either_plan_is_done_in_time(sessions):
    _, each = sessions
    for records in each:
        assert sum(ASSUMED[r.key] for r in records if r.result is not Result.NOT_RUN) <= SECONDS


def test_the_folder_is_small_and_flat(sessions):
    out, each = sessions
    assert {file.name for file in out.iterdir()} == FILES
    assert sum(file.stat().st_size for file in out.iterdir()) <= 16 << 20
    assert latest(read(out / "validation.jsonl")).keys() == {record.key for records in each for record in records}
