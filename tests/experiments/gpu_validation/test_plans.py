"""Both plans rehearsed: the real session, folder and forked processes, by the clock that the plans assume."""

import subprocess
import sys
import time

import pytest
import torch

from kvarena.experiments.gpu_validation import code, command
from kvarena.experiments.gpu_validation.code import code_of, files_of
from kvarena.experiments.gpu_validation.folder import Folder
from kvarena.experiments.gpu_validation.plan import ALL, BEYOND, ENVIRONMENT, ONE, PLANS, RESERVE_S, TWO, each_once
from kvarena.experiments.gpu_validation.record import Result, latest, read
from kvarena.experiments.gpu_validation.step import STEPS, Context, Step, step_named
from kvarena.harness.paths import ROOT

SECONDS = 300.0  # of a plan
ASSUMED = {(row.step.name, case): row.case_s for row, cases in each_once(ALL, "cuda") for case in cases}
FAILS = ("kernels", "fa3, rows")
FAULTS = ("edge", "fa3, mapped to its length")


class AssumedClock:
    """Stands still but for what the cases that have ended are assumed to have taken."""

    def __init__(self, folder):
        self._file, self._known = folder / "validation.jsonl", 0

    def start(self):
        self._known = len(read(self._file))

    def monotonic(self):
        ended = [record for record in read(self._file)[self._known :] if record.result is not Result.NOT_RUN]
        return sum(ASSUMED[record.key] for record in ended)

    def sleep(self, seconds):
        time.sleep(0.01)


def stand_in(step, case, context):
    """What comes back from a case, without the GPU."""
    if step.name == "environment":
        Folder(context.folder).write_environment(
            {"device": "nvidia-h200", "cuda": True, "libraries": {"torch": "2.11"}}
        )
    if step.name in ("decode", "overlap", "prefill", "latencies"):
        kept = context.scratch / "runs" / f"{step.name}_{case}"
        kept.mkdir(parents=True, exist_ok=True)
        (kept / "summary.csv").write_text("kept\n")
    if (step.name, case) == FAULTS:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if (step.name, case) == FAILS and not (context.folder / "mended").exists():
        raise RuntimeError("off by 2")
    return {"value": 1.0}


@pytest.fixture
def rehearse(monkeypatch):
    """Run a plan into a folder; exit status, this session's records and the seconds that the clock shows."""
    monkeypatch.setattr(Step, "run", stand_in)
    monkeypatch.setattr(command, "preload", lambda planned: None)
    monkeypatch.setattr(command, "compile_once", lambda: None)

    def run(out, *arguments):
        out.mkdir(exist_ok=True)
        clock = AssumedClock(out)
        monkeypatch.setattr("kvarena.experiments.gpu_validation.session.time", clock)
        before = len(read(out / "validation.jsonl"))
        with pytest.raises(SystemExit) as left:
            command.main(["--out", str(out), *arguments])
        records = read(out / "validation.jsonl")
        clock.start()
        seconds = sum(ASSUMED[r.key] for r in records[before:] if r.result is not Result.NOT_RUN)
        return left.value.code, records[before:], seconds

    return run


def keys(planned):
    return [(row.step.name, case) for row, cases in planned for case in cases]


def test_either_plan_is_done_in_time(rehearse, tmp_path):
    """Plan 1; what it found is mended; plan 2 in a folder of its own goes on from there."""
    one, two = tmp_path / "one", tmp_path / "two"
    status, records, seconds = rehearse(one, "--plan", "1")
    assert [record.key for record in records] == keys(each_once(PLANS[1], "cuda"))
    assert [record.key for record in records if record.result is not Result.PASSED] == [FAILS]
    assert (status, seconds <= SECONDS) == (command.SOMETHING_BAD, True)
    two.mkdir()
    (two / "mended").write_text("")
    status, records, seconds = rehearse(two, "--plan", "2", "--resume", str(one))
    again = records[len(read(one / "validation.jsonl")) :]
    assert [record.key for record in again] == [("environment", "machine"), FAILS, *keys(each_once(TWO, "cuda"))]
    assert [record.key for record in again if record.result is not Result.PASSED] == [FAULTS] == [again[-1].key]
    assert again[-1].result is Result.FAULTED
    assert sum(ASSUMED[record.key] for record in again) <= SECONDS
    assert latest(records)[FAILS].result is Result.PASSED
    for folder in (one, two):
        assert len([file for file in folder.iterdir() if file.name != "mended"]) <= 8
        assert sum(file.stat().st_size for file in folder.iterdir()) <= 16 << 20


def test_the_assumed_seconds_fit_with_a_reserve_for_what_fails():
    for number, rows in PLANS.items():
        assert sum(row.seconds for row in rows) + RESERVE_S * (number > 1) <= SECONDS
    assert all(row.source for row in ALL)


def test_what_the_budget_does_not_reach_is_recorded_and_comes_first_the_next_time(rehearse, tmp_path):
    rehearse(tmp_path, "--plan", "1", "--budget-s", "100")
    found = latest(read(tmp_path / "validation.jsonl"))
    assert set(found) == set(keys(each_once(PLANS[1], "cuda")))
    missed = [key for key, record in found.items() if record.result is Result.NOT_RUN]
    assert ("tiles", step_named("tiles").cases("cuda")[0]) in missed
    _, records, _ = rehearse(tmp_path, "--plan", "1")
    assert [record.key for record in records if record.key != FAILS] == [("environment", "machine"), *missed]


def test_every_case_of_every_step_is_planned():
    planned = keys(each_once(ALL, "cuda"))
    assert len(set(planned)) == len(planned)
    assert set(planned) == {(step.name, case) for step in STEPS for case in step.cases("cuda")}
    for row in (ENVIRONMENT, *ONE, *TWO, *BEYOND):
        assert row.cases("cuda"), f"{row.step.name}: {row.patterns} name nothing"


def test_the_plans_hold_what_answers_the_goals():
    ones, twos = (keys(each_once(rows, "cuda")) for rows in (ONE, TWO))
    assert [name for name, _ in ones if name == "decode"] == ["decode"] * 2
    assert ("decode", "fa3, CUDA graphs, batch 16") in ones
    assert ("sweep", "batch 32, context 16384") in ones
    assert keys(each_once(PLANS[2], "cuda"))[-1] == FAULTS
    assert ("decode", "fa3, CUDA graphs, batch 1") in twos
    assert not [case for name, case in ones + twos if "flashinfer" in case]  # it stays at home unless it was built


@pytest.mark.parametrize(
    "arguments", [["--plan", "1", "--case", "fa3, rows"], ["--case", "fa3, rows", "--case", "copy"]]
)
def test_single_cases(rehearse, tmp_path, arguments):
    _, records, _ = rehearse(tmp_path, *arguments)
    wanted = [FAILS, ("bandwidth", "copy")] if "copy" in arguments else [FAILS]
    assert [record.key for record in records] == [("environment", "machine"), *wanted]


def test_an_unknown_case_is_refused_with_those_that_exist(rehearse, tmp_path, capsys):
    status, _, _ = rehearse(tmp_path, "--only", "bandwidth", "--case", "fa3")
    assert status == command.USER_ERROR
    assert "There are: machine; read-only reduction; copy; matrix product" in capsys.readouterr().err
    status, _, _ = rehearse(tmp_path / "a", "--resume", str(tmp_path))
    assert status == command.USER_ERROR


# ---- what a case uses ------------------------------------------------------------------------------------------


def names_of(step, case):
    return {path.relative_to(ROOT).as_posix() for path in files_of((step.module, *step.uses(case)))}


def test_the_files_of_a_case_are_those_it_uses_and_no_others():
    fa3, triton = (names_of(step_named("kernels"), f"{name}, rows") for name in ("fa3", "triton"))
    assert "kernels/libraries/fa3.py" in fa3 - triton
    assert "kernels/triton_body.py" in triton - fa3
    assert "kernels/reference.py" in fa3 & triton
    decode = names_of(step_named("decode"), "fa3, CUDA graphs, batch 16")
    assert {"experiments/vattention/decode_cell.py", "conf/experiment/decode_throughput.yaml",
            "allocators/vattention/policy.py", "harness/measured/decode_graphs.py"} <= decode  # fmt: skip
    assert "tests/allocators/vmm/test_vmm_contract.py" in names_of(step_named("driver-contract"), "")
    assert not [name for name in fa3 | triton if name.startswith(("tests/", "experiments/vattention/"))]


def test_a_case_is_run_again_where_a_file_of_it_has_changed(monkeypatch, tmp_path):
    step, changed = step_named("kernels"), ROOT / "kernels" / "libraries" / "fa3.py"
    before = {name: code_of(step, f"{name}, rows") for name in ("fa3", "triton")}
    read_bytes = type(changed).read_bytes
    monkeypatch.setattr(type(changed), "read_bytes", lambda path: read_bytes(path) + b"#" * (path == changed))
    code._digest.cache_clear()
    after = {name: code_of(step, f"{name}, rows") for name in ("fa3", "triton")}
    assert before["fa3"] != after["fa3"]
    assert before["triton"] == after["triton"]
    code._digest.cache_clear()


class ReachedError(Exception):
    """The experiment would be measured now."""


@pytest.mark.parametrize("step", ["decode", "overlap", "prefill", "latencies"])
def test_every_key_of_an_experiment_is_read(step, monkeypatch, tmp_path):
    """A mistake in a command line must not be found by the GPU."""

    def reached(run, recorder):
        runs.append(run)
        raise ReachedError

    runs = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("kvarena.harness.run.run._gpu_here", lambda: "NVIDIA H200")
    monkeypatch.setattr("kvarena.experiments.command.carry_out.carry_out", reached)
    monkeypatch.setattr("kvarena.harness.record.record.Recorder", lambda *_: None)
    monkeypatch.setattr(f"kvarena.experiments.gpu_validation.steps.{step}.missing", lambda spec: None, raising=False)
    monkeypatch.setenv("KVARENA_RUNS", str(tmp_path))
    cases = step_named(step).cases("cuda")
    for case in cases:
        with pytest.raises(ReachedError):
            step_named(step).run(case, Context("cuda", tmp_path, tmp_path))
    assert len(runs) == len(cases)
    if step == "overlap":  # every sequence fills a page-group of 1024 tokens while it counts, 2 MB of Llama-3-8B's K
        [params] = [run.params for run in runs]
        full = [-prompt % 1024 for prompt in params.prompts()]
        first = params.warmup_steps + params.check_steps
        assert all(first < steps <= first + params.iterations for steps in full)
        assert len(set(full)) == 16


LOADED = """
import sys, torch

def touched(*_, **__):
    raise AssertionError("the parent asks for the GPU: its children could not use it")

torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = touched
from kvarena.experiments.gpu_validation.plan import ALL, each_once
from kvarena.experiments.gpu_validation.session import preload
preload(each_once(ALL, "cuda"))
assert "kvarena.experiments.vattention.decode_throughput" in sys.modules
sys.exit("numba" in sys.modules)
"""


def test_the_parent_loads_everything_but_no_gpu_and_no_numba():
    done = subprocess.run([sys.executable, "-P", "-c", LOADED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
