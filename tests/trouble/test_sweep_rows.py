"""Rows of a sweep come in the order asked for, and their names say what differs."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from kvarena.experiments.command import cli, sweep
from kvarena.experiments.command.registry import own_rows
from kvarena.experiments.command.sweep import Sweep
from kvarena.experiments.pagedattention import memory_waste
from kvarena.harness.record.record import Measured, Outcome, Recorder
from kvarena.harness.record.summary import COLUMNS

SMALL = ("experiment=memory_waste", "arrival.rate=60", "arrival.duration_s=1", "params.window_s=[0,2]",
         "params.seeds=[0]")  # fmt: skip
ROW = dict.fromkeys(COLUMNS, "-") | {
    "experiment": "memory_waste", "paper": "kvarena", "figure": "memory_waste", "panel": "s", "setup": "s", "x": 1.0,
    "system": "paged", "label": "paged", "n": 1, "ci_low": float("nan"), "ci_high": float("nan"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("KVARENA_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(memory_waste, "draw", lambda _: Figure())
    yield tmp_path / "runs" / "memory_waste"
    os.environ.pop(sweep._VARIABLE, None)


@pytest.fixture
def swept(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Runs a sweep as the command line does; its systems, in the order of the table."""

    def run(*overrides: str) -> list[str]:
        monkeypatch.setattr("sys.argv", ["kvarena"])
        assert cli.guarded(lambda: cli._command(["-m", *SMALL, *overrides])) == 0, capsys.readouterr().err
        return list(dict.fromkeys(own_rows(pd.read_csv(runs / "latest" / "summary.csv")).system))

    return run


def lengths(path: Path) -> str:
    path.write_text("prompt_tokens,output_tokens\n100,20\n120,30\n")
    return str(path)


def test_files_are_told_apart_by_what_was_written(swept: Callable[..., list[str]], tmp_path: Path) -> None:
    """Of one name in two folders, of one content, and with letters that Hydra wants quoted."""
    (tmp_path / "z").mkdir()
    paths = [lengths(tmp_path / "z" / "a.csv"), lengths(tmp_path / "a.csv"), lengths(tmp_path / "a$ b=1.csv")]
    quoted = ",".join(f"'{path}'" for path in paths)
    assert swept("systems=[paged]", f"trace.path={quoted}") == [f"paged/vllm2023 [trace.path={path}]" for path in paths]


def test_systems_and_another_key(swept: Callable[..., list[str]]) -> None:
    assert swept("systems=[vattention-64kb],[paged]", "trace.max_tokens=900,500", "trace=sharegpt") == [
        f"{system}/vllm2023 [trace.max_tokens={tokens}]"
        for tokens in (900, 500) for system in ("vattention-64KB", "paged")
    ]  # fmt: skip


def test_equal_jobs_are_measured_once_and_that_is_said(
    swept: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert swept("systems=[paged]", "arrival=gamma", "arrival.burstiness=0.2,1e-1,0.1") == [
        "paged/vllm2023 [arrival.burstiness=0.2]", "paged/vllm2023 [arrival.burstiness=0.1]",
    ]  # fmt: skip
    assert capsys.readouterr().err.count("already measured by this sweep") == 1


class Jobs:
    """A sweep of jobs that measure nothing."""

    def __init__(self, *jobs: tuple[str, ...]) -> None:
        self._whole = Sweep("memory_waste", ["a=1,2"])
        self._jobs = jobs

    def rows(self, order: list[int] | None = None) -> list[str]:
        """The systems of the table; jobs end in this order."""
        for number in order or range(len(self._jobs)):
            own = self._jobs[number]
            config = {"clock": "modelled", "files": {}, "overrides": list(own)}
            job = sweep.job_folder(config)
            assert job is not None
            if not job.is_dir():
                table = pd.DataFrame([ROW | {"quantity": "q", "value": float(number)}], columns=COLUMNS)
                measured = Measured({"points": table[["value"]]}, sweep.notes(own))
                Recorder("memory_waste", config, job).finish(Outcome(measured, table, "q", Figure()))
            sweep.note(job, own, [number])
        self.folder, outcome = self._whole.finish()
        return list(outcome.summary.system)


def test_many_jobs_keep_their_order_whichever_ends_first() -> None:
    jobs = Jobs(*((f"a={number}",) for number in range(23, 0, -1)))
    assert jobs.rows(order=[*range(1, 23, 2), *range(0, 23, 2)]) == [f"paged [a={n}]" for n in range(23, 0, -1)]
    kept = sorted(path.name for path in (jobs.folder / "jobs").iterdir())
    assert [name[:3] for name in kept] == [f"{n:02}-" for n in range(1, 24)]
    frames = pd.read_parquet(jobs.folder / "points.parquet")
    assert frames.value.tolist() == list(range(23))


@pytest.mark.parametrize(
    ("jobs", "names"),
    [
        ([("a=1", "b=x"), ("a=2", "b=x")], ["a=1", "a=2"]),
        ([("a=1", "b=x"), ("a=1", "b=y"), ("a=2", "b=x")], ["a=1, b=x", "a=1, b=y", "a=2, b=x"]),
        ([("a='p, q'",), ('a="p"',), ("a=p q",)], ["a=p, q", "a=p", "a=p q"]),
        ([("a={x:1,y:[2,3]}",), ("a={x:2}",)], ["a={x:1,y:[2,3]}", "a={x:2}"]),
        ([("a=[1,2]",), ("a=[2,1]",)], ["a=[1,2]", "a=[2,1]"]),
        ([("+a.b=null",), ("+a.b=7",)], ["+a.b=null", "+a.b=7"]),
        ([("a=1e-3",), ("a=0.002",), ("a=true",)], ["a=1e-3", "a=0.002", "a=true"]),
    ],
)
def test_a_row_is_called_by_what_differs(jobs: list[tuple[str, ...]], names: list[str]) -> None:
    assert Jobs(*jobs).rows() == [f"paged [{name}]" for name in names]


def test_jobs_of_an_earlier_try_that_nobody_asks_for_now_have_no_row() -> None:
    killed = Jobs(("a=1",), ("a=2",))
    config = {"clock": "modelled", "files": {"own.csv": "before"}, "overrides": ["a=1"]}
    job = sweep.job_folder(config)
    table = pd.DataFrame([ROW | {"quantity": "q", "value": 7.0}], columns=COLUMNS)
    Recorder("memory_waste", config, job).finish(Outcome(Measured({}, sweep.notes(["a=1"])), table, "q", Figure()))
    killed._whole._turn.end()
    again = Jobs(("a=1",), ("a=2",))
    assert again.rows() == ["paged [a=1]", "paged [a=2]"]
    assert len(list((again.folder / "jobs").iterdir())) == 2


def test_a_sweep_of_lengths_is_drawn(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its labels go on with what differs: in one panel, and in one for each file."""
    for files, bins in (([lengths(tmp_path / "a.csv")], "1,2"), ([lengths(tmp_path / f"{n}.csv") for n in "bc"], "1")):
        monkeypatch.setattr("sys.argv", ["kvarena"])
        asked = ["params.traces=[sharegpt]", f"trace.path={','.join(files)}", f"params.num_bins={bins}"]
        assert cli.guarded(partial(cli._command, ["-m", "experiment=trace_lengths", *asked])) == 0
        os.environ.pop(sweep._VARIABLE, None)
    assert (runs.parent / "trace_lengths" / "latest" / "figure.png").is_file()
