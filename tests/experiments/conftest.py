"""Running an experiment in a test: as the command line would, into a folder of the test's own.

`tiny`, which is no test, is imported by its name.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from kvarena.experiments.command.carry_out import carry_out
from kvarena.experiments.command.compose import compose_run
from kvarena.experiments.command.registry import own_rows
from kvarena.harness.record.record import Recorder
from kvarena.harness.record.summary import COLUMNS, frame, row

sys.path.append(str(Path(__file__).parent))


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`finished("memory_waste", overrides...)` is the folder of the finished run."""
    monkeypatch.setenv("KVARENA_RUNS", str(tmp_path))

    def measure(experiment: str, *overrides: str) -> Path:
        run = compose_run(f"experiment={experiment}", *overrides)
        recorder = Recorder(run.experiment, run.plain())
        folder = recorder.finish(carry_out(run, recorder))
        assert (folder / "figure.png").stat().st_size > 10_000
        return folder

    return measure


@pytest.fixture
def summary_of(finished: Callable[..., Path]) -> Callable[..., pd.DataFrame]:
    """`summary_of("memory_waste", overrides...)`: the experiment's own rows, read back; all are held to the schema."""

    def read(experiment: str, *overrides: str) -> pd.DataFrame:
        summary = pd.read_csv(finished(experiment, *overrides) / "summary.csv")
        assert list(summary.columns) == COLUMNS
        assert summary.value.notna().all()
        frame(row(r["value"], **{c: r[c] for c in COLUMNS if c not in ("value", "n", "ci_low", "ci_high")})
              for r in summary.where(summary.notna(), None).to_dict("records"))  # fmt: skip
        return own_rows(summary)

    return read
