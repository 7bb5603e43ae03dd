"""Running what strangers ran: in process, by the modelled clock, into a folder of the test's own."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest

from kvarena.experiments.command import show
from kvarena.experiments.command.carry_out import carry_out
from kvarena.experiments.command.compose import compose_run
from kvarena.harness.record.record import Outcome, Recorder


class Done(NamedTuple):
    """What a run made and said."""

    outcome: Outcome
    finish: Callable[[], Path]  # write it; returns the folder
    out: str
    err: str

    @property
    def summary(self) -> pd.DataFrame:
        """The rows of summary.csv."""
        return self.outcome.summary

    def value(self, quantity: str) -> dict[str, float]:
        """The quantity of each label."""
        rows = self.summary[self.summary.quantity == quantity]
        return dict(zip(rows.label, rows.value, strict=True))

    @property
    def words(self) -> str:
        """All that is written above the figure's panels."""
        return " ".join(" ".join(text.get_text() for text in self.outcome.figure.texts).split())


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """`ran("memory_waste", overrides...)` as the command line runs it, but for the writing."""
    monkeypatch.setenv("KVARENA_RUNS", str(tmp_path / "runs"))

    def run_it(experiment: str, *overrides: str) -> Done:
        capsys.readouterr()
        run = compose_run(f"experiment={experiment}", *overrides)
        recorder = Recorder(run.experiment, run.plain())
        outcome = carry_out(run, recorder)
        show.outcome(outcome, tmp_path)
        said = capsys.readouterr()
        return Done(outcome, partial(recorder.finish, outcome), " ".join(said.out.split()), said.err)

    return run_it


@pytest.fixture
def own(tmp_path: Path) -> Callable[..., str]:
    """`own("100,20", "30,5")` is the path of a file of lengths; with `header=` of other columns."""

    def write(*rows: str, header: str = "prompt_tokens,output_tokens", name: str = "own.csv") -> str:
        path = tmp_path / name
        path.write_text("\n".join([header, *rows]) + "\n")
        return str(path)

    return write
