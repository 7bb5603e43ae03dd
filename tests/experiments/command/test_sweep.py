"""What a sweep leaves behind, wherever it was killed."""

import json
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from kvarena.experiments.command import sweep
from kvarena.experiments.command.over_seeds import over_seeds
from kvarena.experiments.command.sweep import Sweep
from kvarena.experiments.pagedattention import memory_waste
from kvarena.harness.record.record import Frames, Measured, Outcome, Recorder
from kvarena.harness.record.summary import COLUMNS
from kvarena.harness.run.published import OURS

NAN = float("nan")

TABLE = pd.DataFrame({"a": [1, 2]})
ROW = dict.fromkeys(COLUMNS, "-") | {
    "experiment": "memory_waste", "paper": OURS, "figure": "memory_waste", "panel": "s", "setup": "s", "quantity": "q",
    "system": "paged/numba", "label": "paged/numba", "x": 1.0, "n": 1, "ci_low": NAN, "ci_high": NAN,
}  # fmt: skip
EARNED = {"paper": "pagedattention", "figure": "fig2", "panel": "OPT-13B", "system": "vLLM"}


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVARENA_RUNS", str(tmp_path))
    monkeypatch.setenv("KVARENA_SWEEP", "")  # a sweep sets it: give it back at the end
    monkeypatch.setattr(memory_waste, "draw", lambda _: Figure())
    return tmp_path / "memory_waste"


def finish(*overrides: str, clock: str = "modelled", frames: Frames | None = None, **row: object) -> None:
    """A job of the sweep that is under way."""
    config = {"clock": clock, "overrides": list(overrides)}
    job = sweep.job_folder(config)
    recorder = Recorder("memory_waste", config, job)
    recorder.cell("batch-1", lambda: {"steps": TABLE})
    measured = Measured(frames or {"points": TABLE}, sweep.notes(overrides))
    rows = [ROW | row] if "rows" not in row else row["rows"]
    recorder.finish(Outcome(measured, pd.DataFrame(rows, columns=COLUMNS), "q", Figure()))
    sweep.note(job, overrides, [len(list((job.parent / ".asked").iterdir()))])


def begun(*arguments: str) -> Sweep:
    return Sweep("memory_waste", list(arguments))


def test_a_job_killed_before_it_forgets_its_cells_leaves_none(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = begun("a=1,2")
    (folder,) = (each for each in (runs / ".unfinished").iterdir() if each.is_dir())
    with monkeypatch.context() as killed:
        killed.setattr("kvarena.harness.record.record.shutil.rmtree", lambda *_, **__: None)  # died between the two
        finish("a=1", value=1.0)
    (folder / ".job-2-written-half").mkdir()
    (folder / ".job-2-written-half" / "summary.csv").touch()
    finish("a=2", value=2.0)
    target, _ = whole.finish()
    assert len(list((target / "jobs").iterdir())) == 2
    assert not list((runs / ".unfinished").iterdir())


def test_rows_say_what_was_swept_and_frames_of_which_job_they_are(runs: Path) -> None:
    whole = begun("a=1,2", "b=7")
    finish("a=1", "b=7", value=1.0)
    finish("a=2", "b=7", value=2.0, frames={"points": TABLE, "samples": TABLE})
    target, outcome = whole.finish()
    assert set(outcome.summary.system) == set(outcome.summary.label) == {"paged/numba [a=1]", "paged/numba [a=2]"}
    assert outcome.measured.frames["points"].job.tolist() == ["a=1", "a=1", "a=2", "a=2"]
    assert set(outcome.measured.frames["samples"].job) == {"a=2"}
    assert {path.name for path in target.glob("*.parquet")} == {"points.parquet", "samples.parquet"}
    assert "remark" not in outcome.measured.notes


def test_a_published_name_is_kept_by_the_one_job_that_earned_it_and_by_none_of_two() -> None:
    whole = begun("a=1,2")
    finish("a=1", value=1.0, **EARNED)
    finish("a=2", value=2.0)
    _, outcome = whole.finish()
    assert outcome.summary.set_index("value").system.to_dict() == {1.0: "vLLM", 2.0: "paged/numba [a=2]"}

    whole = begun("a=1,2", "b=1")
    finish("a=1", value=1.0, **EARNED)
    finish("a=2", value=2.0, **EARNED)
    _, outcome = whole.finish()
    assert set(outcome.summary.paper) == {OURS}
    assert set(outcome.summary.system) == {"paged/numba [a=1]", "paged/numba [a=2]"}


@pytest.mark.parametrize(("clock", "remarks"), [("measured", 1), ("modelled", 0)])
def test_measured_jobs_are_said_not_to_be_comparable(clock: str, remarks: int) -> None:
    whole = begun("a=1,2")
    finish("a=1", clock=clock, value=1.0)
    finish("a=2", clock=clock, value=2.0)
    target, outcome = whole.finish()
    assert list(outcome.measured.notes.values()) == [sweep.APART] * remarks
    kept = json.loads((target / "provenance.json").read_text())
    assert ("remark" in kept) == bool(remarks)


def test_seeds_become_one_row_with_an_interval_and_are_comparable() -> None:
    whole = begun("trace.seed=range(0,6)")
    for seed in range(6):
        names = EARNED | {"evidence": "calibrated"} if seed == 0 else {"evidence": "predicted"}
        finish(f"trace.seed={seed}", clock="measured", value=float(seed), **names)
    target, outcome = whole.finish()
    assert outcome.measured.notes == {}
    ours, earned = (outcome.summary[outcome.summary.paper == paper] for paper in (OURS, "pagedattention"))
    (row,), (one,) = (rows.to_dict("records") for rows in (ours, earned))
    assert (row["system"], row["panel"], row["figure"]) == ("paged/numba", "s", "memory_waste")
    assert (row["value"], row["n"], row["ci_low"], row["ci_high"], row["evidence"]) == (2.5, 6, 0, 5, "predicted")
    assert (one["system"], one["value"], one["n"], one["evidence"]) == ("vLLM", 0, 1, "calibrated")
    assert set(outcome.measured.frames["points"].job) == {f"trace.seed={seed}" for seed in range(6)}
    assert list(pd.read_csv(target / "summary.csv").columns) == COLUMNS


def test_seeds_of_each_other_value_are_one_row() -> None:
    whole = begun("arrival.seed=0,1", "a=1,2")
    for seed in (0, 1):
        for a in (1, 2):
            finish(f"arrival.seed={seed}", f"a={a}", value=10.0 * a + seed)
    _, outcome = whole.finish()
    assert outcome.summary.set_index("system").value.to_dict() == {"paged/numba [a=1]": 10.5, "paged/numba [a=2]": 20.5}
    assert set(outcome.summary.n) == {2}


def test_a_name_that_every_seed_earned_is_kept() -> None:
    tables = [pd.DataFrame([ROW | EARNED | {"value": float(seed)}], columns=COLUMNS) for seed in range(3)]
    (row,) = over_seeds(tables).to_dict("records")
    assert (row["system"], row["value"], row["n"]) == ("vLLM", 1, 3)


def test_a_row_of_ours_beside_an_earned_one_is_counted_once() -> None:
    """As of experiments whose own rows are over `params.seeds`."""
    both = [pd.DataFrame([ROW | {"value": s}, ROW | EARNED | {"value": 9.0}], columns=COLUMNS) for s in (1.0, 2.0)]
    rows = over_seeds(both).set_index("system")
    assert rows.value.to_dict() == {"paged/numba": 1.5, "vLLM": 9}
    assert rows.n.to_dict() == {"paged/numba": 2, "vLLM": 2}


def test_a_sweep_of_one_job_is_that_run(runs: Path) -> None:
    whole = begun("allocator.block_size=8,16")
    finish("experiment=memory_waste", value=1.0)
    target, outcome = whole.finish()
    assert set(outcome.summary.system) == {"paged/numba"}
    assert not (target / "jobs").exists()
    kept = json.loads((target / "provenance.json").read_text())
    assert kept["command"] == ["-m", "allocator.block_size=8,16"]
