"""What a sweep leaves behind, wherever it was killed."""

from pathlib import Path

import pandas as pd
import pytest

from kvarena.experiments.sweep import Sweep, _labelled
from kvarena.harness.record import Measured, Outcome, Recorder
from kvarena.harness.summary import COLUMNS

SUMMARY = pd.DataFrame([dict.fromkeys(COLUMNS, "x")])
TABLE = pd.DataFrame({"a": [1, 2]})


def a_job(sweep_folder: Path, value: int) -> Recorder:
    return Recorder("serving_latency", {"value": value}, sweep_folder / f"job-{value:012}")


def finish(recorder: Recorder) -> None:
    from matplotlib.figure import Figure

    recorder.cell("batch-1", lambda: {"steps": TABLE})
    recorder.finish(Outcome(Measured({"steps": TABLE}), SUMMARY, "x", Figure()))


def test_rows_of_a_sweep_say_what_was_swept_and_keep_what_they_earned() -> None:
    rows = pd.concat([SUMMARY, SUMMARY]).assign(
        paper=["kvarena", "vattention"], system=["paged/fa2", "FA2_Paged"], label="paged/fa2"
    )
    told = _labelled(rows, "threads=2")
    assert list(told.system) == ["paged/fa2 [threads=2]", "FA2_Paged"]
    assert list(told.label) == ["paged/fa2 [threads=2]"] * 2


def test_a_job_killed_before_it_forgets_its_cells_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVARENA_RUNS", str(tmp_path))
    monkeypatch.setenv("KVARENA_SWEEP", "")  # the sweep sets it: give it back at the end
    sweep = Sweep("serving_latency", ["a=1,2"])
    home = tmp_path / "serving_latency"
    (folder,) = (home / ".unfinished").iterdir()
    with monkeypatch.context() as killed:
        killed.setattr("kvarena.harness.record.shutil.rmtree", lambda *_, **__: None)  # died between the two
        finish(a_job(folder, 1))
    (folder / ".job-2-written-half").mkdir()
    (folder / ".job-2-written-half" / "summary.csv").touch()
    finish(a_job(folder, 2))
    monkeypatch.setattr("kvarena.experiments.sweep.Sweep._aggregate", lambda *_: Outcome(Measured({}), SUMMARY, "x"))
    target, _ = sweep.finish()
    assert sorted(path.name for path in (target / "jobs").iterdir()) == ["job-000000000001", "job-000000000002"]
    assert not list((home / ".unfinished").iterdir())
