"""The main job, small: what it writes, what it refuses, and what survives a kill."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pandas as pd
import pytest

from kvarena.allocators.usage import LEAVES
from kvarena.errors import UserError
from kvarena.experiments.command.carry_out import carry_out
from kvarena.experiments.command.compose import compose_run
from kvarena.harness.paths import ROOT
from kvarena.harness.record.record import Recorder
from kvarena.harness.record.summary import COLUMNS

SMALL = (
    "experiment=decode_throughput", "device=cpu", "model=tiny-llama", "params.batch_sizes=[1,3]",
    "params.prompts=['40']", "params.max_tokens=512", "params.rounds=6", "params.steps_per_round=2",
    "params.warmup_steps=1",
)  # fmt: skip


def measure(runs: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Path:
    monkeypatch.setenv("KVARENA_RUNS", str(runs))
    run = compose_run(*SMALL, *overrides)
    recorder = Recorder(run.experiment, run.plain())
    return recorder.finish(carry_out(run, recorder))


def test_a_run_reports_every_system_at_every_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = measure(tmp_path, monkeypatch)
    summary = pd.read_csv(folder / "summary.csv")
    assert list(summary.columns) == COLUMNS
    throughput = summary[summary.quantity == "decode_throughput_vs_batch"]
    assert set(throughput.system) == {
        "static/numba", "paged/numba", "vattention/numba", "static/sdpa", "vattention/sdpa", "paged/gather_sdpa",
    }  # fmt: skip
    assert set(throughput.x) == {1, 3}
    assert (throughput.value > 0).all()
    assert (throughput.n == 6).all()
    assert (throughput.ci_low <= throughput.value).all()
    assert (throughput.value <= throughput.ci_high).all()
    shares = summary[summary.quantity.str.startswith("share_of_kv_memory:")]
    assert shares.groupby(["system", "x"]).value.sum().round(6).eq(100).all()
    assert len(shares.quantity.unique()) == len(LEAVES)
    steps = pd.read_parquet(folder / "steps.parquet")
    assert len(steps) == 6 * 2 * 2 * 6  # systems x batch sizes x steps of a round x rounds
    assert (steps[list(LEAVES)].sum(axis=1).groupby(steps.batch).nunique() == 1).all()  # one pool for all systems
    first, batch = steps[(steps["round"] == 0) & (steps.step == 0)], [1, 3]
    untimed = compose_run(*SMALL).params.check_steps + 1  # and one to warm up
    assert set(first.kv_tokens) == {n * (40 + untimed + 1) for n in batch}, "prompts, and a token of each step so far"
    over_paged = summary[summary.quantity == "throughput_over_paged_vs_batch"]
    assert set(over_paged.system) == {"static/numba", "vattention/numba"}, "no paged system has sdpa's kernel"
    seconds = steps[steps.batch == 3].groupby(["system", "round"]).step_s.sum()
    by_hand = (seconds["paged-numba"] / seconds["vattention-numba"]).median()
    (ratio,) = over_paged[(over_paged.system == "vattention/numba") & (over_paged.x == 3)].value
    assert ratio == pytest.approx(by_hand)


def test_paged_and_vattention_take_less_than_static(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = pd.read_csv(measure(tmp_path, monkeypatch, "kernel=numba") / "summary.csv")
    free = summary[(summary.quantity == "share_of_kv_memory:free") & (summary.x == 3)].set_index("allocator").value
    assert free["static"] == 0
    assert free["paged"] > 30


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("params.batch_sizes=[]", "at least one"),
        ("params.batch_sizes=[0]", "at least 1"),
        ("params.batch_sizes=[2,2]", "none twice"),
        ("params.prompts=['500']", "from 1 to"),
        ("params.prompts=[all]", "neither"),
        ("params.max_tokens=100000", "tiny-llama ends at"),
        ("params.rounds=0", "at least 1"),
        ("params.batch_sizes=[100000000]", "cannot fit"),
    ],
)
def test_what_cannot_run_is_refused_with_a_number(
    override: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=said):
        measure(tmp_path, monkeypatch, override)


def test_a_batch_that_its_pool_cannot_hold_says_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"batch of 3 .*paged.*2 sequences"):
        measure(tmp_path, monkeypatch, "systems=[paged-numba]", "params.batch_sizes=[3]", "params.pool_bytes=65536")


def start(runs: Path, *overrides: str) -> subprocess.Popen[str]:
    given = {override.partition("=")[0] for override in overrides}  # a key may be written once
    small = [override for override in SMALL if override.partition("=")[0] not in given]
    command = [sys.executable, "-P", "-m", "kvarena", *small, *overrides]
    environment = os.environ | {"KVARENA_RUNS": str(runs), "PYTHONPATH": str(ROOT / ".import")}
    # A shell's background jobs ignore SIGINT, and so would whatever a test that runs in one starts.
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, preexec_fn=listen)


def test_an_interrupted_run_is_continued_by_the_same_command(tmp_path: Path) -> None:
    home = tmp_path / "decode_throughput"
    # A first cell that ends soon, and others that take long enough to be interrupted in.
    slow = ("systems=[static-numba,paged-numba]", "params.rounds=12", "params.batch_sizes=[1,200,210,220]")
    first = start(tmp_path, *slow)
    deadline = time.monotonic() + 120
    while not list(home.glob(".unfinished/*/40-tokens-1")) and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.02)
    first.send_signal(signal.SIGINT)
    _, error = first.communicate(timeout=60)
    assert first.returncode == 130, error
    assert "the same command continues" in error
    assert "Traceback" not in error
    assert not list(home.glob("2*"))  # nothing half-written
    kept = {path.name: path.stat().st_mtime_ns for path in home.glob(".unfinished/*/40-*")}
    assert kept
    output, error = start(tmp_path, *slow).communicate(timeout=120)
    (folder,) = home.glob("2*")
    assert output.rstrip().endswith(f"results: {folder}"), error
    assert len(pd.read_parquet(folder / "steps.parquet").batch.unique()) == 4
    assert not list(home.glob(".unfinished/*"))


def test_a_sweep_over_fields_of_an_allocator_is_one_run_that_is_interleaved(tmp_path: Path) -> None:
    sweep = ("-m", "allocator=paged", "kernel=numba", "allocator.block_size=8,16", "params.batch_sizes=[2]")
    output, error = start(tmp_path, *sweep).communicate(timeout=120)
    (folder,) = (tmp_path / "decode_throughput").glob("2*")
    assert output.count("results: ") == 1, error
    summary = pd.read_csv(folder / "summary.csv")
    assert list(summary.columns) == COLUMNS
    throughput = summary[summary.quantity == "decode_throughput_vs_batch"]
    assert sorted(throughput.system) == [
        "paged{block_size: 16}/numba",
        "paged{block_size: 8}/numba",
    ]
    steps = pd.read_parquet(folder / "steps.parquet")
    assert (steps.groupby(["batch", "round"]).system.nunique() == 2).all(), "both systems in every round"
    assert not (folder / "jobs").exists()
    assert "block_size: 16" in output


def test_a_users_mistake_is_one_message(tmp_path: Path) -> None:
    process = start(tmp_path, "allocator=paged", "allocator.block_size=0")
    output, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error.startswith("error: ")
    assert "Traceback" not in error + output
    assert not list(tmp_path.glob("decode_throughput/2*"))
