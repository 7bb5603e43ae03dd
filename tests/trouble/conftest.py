"""Running what strangers ran: in process, by the modelled clock, into a folder of the test's own."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest

from kvarena.experiments.command import show
from kvarena.experiments.command.carry_out import carry_out
from kvarena.experiments.command.compose import compose_run
from kvarena.harness.record.record import Outcome, Recorder
from kvarena.harness.trace import Trace, TraceConfig, load_trace


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


class Loaded(NamedTuple):
    """What is kept of a file, how many records it has, and which of them are bad: the first five, from 1."""

    trace: Trace
    read: int
    bad: list[int]

    @property
    def prompts(self) -> list[int]:
        """Prompt lengths of what is kept."""
        return self.trace.prompt_tokens.tolist()


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


@pytest.fixture
def loaded(tmp_path: Path) -> Callable[..., Loaded]:
    """`loaded(content, keys of the trace...)`: what is kept of a file of that content, and which records are bad."""

    def load(content: str | bytes, name: str = "trace", **keys: Any) -> Loaded:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        trace = load_trace(TraceConfig(path=str(path), **{"on_bad_record": "skip", **keys}))
        facts = trace.provenance
        told = [int(reason.split(":")[0].removeprefix("record ")) for reason in facts["malformed_reasons"]]
        assert len(told) == min(5, facts["malformed"])
        assert facts["read"] == facts["malformed"] + facts["without_request"] + facts["filtered"] + len(trace)
        return Loaded(trace, facts["read"], told)

    return load
