"""What a run writes: all of it or nothing."""

import errno
import json
import os
from pathlib import Path

import pandas as pd
import pytest

from kvarena.errors import UserError
from kvarena.harness.record import record
from kvarena.harness.record.record import Frames, Measured, Outcome, Recorder, read_frames

TABLE = pd.DataFrame({"a": [1, 2]})


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVARENA_RUNS", str(tmp_path))
    return tmp_path


def outcome() -> Outcome:
    from matplotlib.figure import Figure

    measured = Measured({"requests": TABLE, "points": TABLE}, notes={"seed": 7}, files={"steps.html": "<p>"})
    return Outcome(measured, summary=TABLE, headline="q", figure=Figure())


def recorder(value: int = 0) -> Recorder:
    return Recorder("demo", {"value": value})


def test_a_finished_run_has_every_file_and_latest_points_at_it(runs: Path) -> None:
    folder = recorder().finish(outcome())
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "summary.csv", "requests.parquet", "points.parquet", "provenance.json", "config.yaml",
        "figure.png", "figure.svg", "steps.html",
    }  # fmt: skip
    assert (runs / "demo" / "latest").resolve() == folder
    kept = json.loads((folder / "provenance.json").read_text())
    assert kept["seed"] == 7
    assert kept["config"] == {"value": 0}
    assert {"git", "libraries", "machine", "written", "command"} <= set(kept)


def test_a_frame_without_rows_is_not_written() -> None:
    empty = Measured({"points": TABLE.iloc[:0]})
    with pytest.raises(ValueError, match="points has no rows"):
        recorder().finish(Outcome(empty, TABLE, "q"))


def test_what_was_measured_is_kept_with_the_cells_of_a_run_whose_summary_failed() -> None:
    keeper = recorder()
    keeper.cell("batch-1", lambda: {"steps": TABLE})
    folder = keeper.keep(outcome().measured)
    assert {"requests.parquet", "points.parquet", "config.yaml", "provenance.json"} <= set(os.listdir(folder))
    pd.testing.assert_frame_equal(read_frames(folder)["points"], TABLE)
    recorder().cell("batch-1", lambda: pytest.fail("it is measured again"))


def test_the_same_figure_is_the_same_bytes() -> None:
    first, second = (recorder().finish(outcome()) for _ in range(2))
    assert first != second
    assert (first / "figure.svg").read_bytes() == (second / "figure.svg").read_bytes()


def measured(calls: list[int]) -> Frames:
    calls.append(1)
    return {"steps": TABLE}


def test_an_unfinished_run_is_continued_and_a_finished_one_measured_again() -> None:
    calls: list[int] = []
    recorder().cell("batch-1", lambda: measured(calls))
    again = recorder()  # the first one was killed here
    frames = again.cell("batch-1", lambda: measured(calls))
    pd.testing.assert_frame_equal(frames["steps"], TABLE)
    assert len(calls) == 1
    again.finish(outcome())
    recorder().cell("batch-1", lambda: measured(calls))
    assert len(calls) == 2


def test_another_configuration_shares_no_cells() -> None:
    calls: list[int] = []
    recorder(0).cell("batch-1", lambda: measured(calls))
    recorder(1).cell("batch-1", lambda: measured(calls))
    assert len(calls) == 2


def test_a_cell_that_fails_leaves_nothing() -> None:
    def fail() -> Frames:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recorder().cell("batch-1", fail)
    calls: list[int] = []
    recorder().cell("batch-1", lambda: measured(calls))
    assert calls


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_refusing_file_system_is_explained_and_nothing_half_written(
    code: int, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = recorder()
    monkeypatch.setattr(
        record, "write_outcome", lambda *_: (_ for _ in ()).throw(OSError(code, os.strerror(code), "summary.csv"))
    )
    with pytest.raises(UserError, match="KVARENA_RUNS"):
        keeper.finish(outcome())
    assert {path.name for path in (runs / "demo").iterdir()} == {".unfinished"}


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVARENA_RUNS", "/proc/kvarena")  # refused even to root
    with pytest.raises(UserError, match="cannot write results"):
        recorder()


def test_a_full_disk_is_noticed_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(record, "_probe", full)
    with pytest.raises(UserError, match="no space is left"):
        recorder()


def test_what_is_kept_goes_with_the_cells_once_the_run_ends(runs: Path) -> None:
    keeper = recorder()
    keeper.cell("batch-1", lambda: measured([]))
    kept = keeper.keep(outcome().measured)
    assert recorder().keep(outcome().measured) == kept, "a second try replaces the first"
    recorder().finish(outcome())
    assert not list((runs / "demo" / ".unfinished").iterdir())
