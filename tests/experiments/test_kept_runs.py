"""Kept runs are what today's code makes of their frames, and come from a commit that is known."""

import io
import json
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from omegaconf import OmegaConf

from kvarena.experiments.command.carry_out import resolved_in, summary_of
from kvarena.harness.paths import RESULTS, ROOT
from kvarena.harness.record.record import read_frames
from kvarena.harness.scorecard.kept_runs import kept_folders

KEPT = kept_folders()


def name_of(folder: Path) -> str:
    return str(folder.relative_to(RESULTS))


def git(*arguments: str) -> str | None:
    done = subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


@pytest.mark.parametrize("folder", KEPT, ids=name_of)
def test_its_frames_give_its_summary_again(folder: Path) -> None:
    """Where they do not, the code has changed since: `./run.sh summarize` it, or run it again."""
    kept = pd.read_csv(folder / "summary.csv")
    run = resolved_in(folder)
    again = summary_of(run, read_frames(folder))
    again = pd.read_csv(io.StringIO(again.to_csv(index=False)))  # as many digits as the file has
    pd.testing.assert_frame_equal(again, kept, check_exact=True)


@pytest.mark.parametrize("folder", KEPT, ids=name_of)
def test_its_code_is_a_commit_and_nothing_else(folder: Path) -> None:
    record = json.loads((folder / "provenance.json").read_text())
    assert record["git"]["dirty"] is False, "nobody could run that code again"
    config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    assert record["config"] == json.loads(json.dumps(config)), "JSON has no keys that are numbers"
    if git("rev-parse", "--is-shallow-repository") != "false":
        pytest.skip("this checkout has no history")
    assert git("cat-file", "-t", record["git"]["commit"]) == "commit"


def test_every_folder_of_results_is_a_run_that_is_judged() -> None:
    """So that no run lies there unread: a folder of a device holds experiments, each whole."""
    assert len(KEPT) > 40
    summaries = {path.parent for path in RESULTS.rglob("summary.csv") if not path.is_relative_to(RESULTS / "runs")}
    assert summaries == set(KEPT)
    for folder in KEPT:
        there = {path.name for path in folder.iterdir()}
        assert {"summary.csv", "config.yaml", "provenance.json", "figure.png"} <= there, name_of(folder)
        assert any(name.endswith(".parquet") for name in there), name_of(folder)


@pytest.mark.parametrize("folder", KEPT, ids=name_of)
def test_its_rows_say_clock_device_evidence_and_interval_alike(folder: Path) -> None:
    """By rules of their own: whatever computes them is not asked."""
    rows = pd.read_csv(folder / "summary.csv")
    measured = rows.clock == "measured"
    assert rows.evidence[measured].isin(["exact", "measured"]).all()
    assert rows.evidence[~measured].isin(["exact", "predicted", "calibrated", "conditional"]).all()
    assert (rows.device[measured] == folder.parent.name).all(), "one machine, one folder"
    assert not (measured.any() and folder.parent.name.endswith("-modelled"))
    if folder.parent.name == "cpu":
        theirs = rows[measured & (rows.paper != "kvarena") & (rows.figure != "table1")]  # which is of any device
        assert (theirs.evidence == "exact").all(), "no paper has measured this machine"
    has_interval = rows.ci_low.notna()
    assert (has_interval == (rows.n >= 6)).all()
    assert ((rows.ci_low <= rows.value) & (rows.value <= rows.ci_high))[has_interval].all()
