"""A failure while drawing or printing loses nothing."""

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from kvarena.errors import UserError
from kvarena.experiments.command import cli, registry
from kvarena.experiments.command.carry_out import carry_out
from kvarena.experiments.command.compose import compose_run
from kvarena.experiments.pagedattention import memory_waste
from kvarena.harness.paths import ROOT
from kvarena.harness.record.record import Recorder, read_frames
from kvarena.harness.record.summary import COLUMNS

SMALL = ("experiment=memory_waste", "systems=[paged]", "arrival.rate=60", "arrival.duration_s=1",
         "params.window_s=[0,8]", "params.seeds=[0]")  # fmt: skip


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVARENA_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs" / "memory_waste"


def own_file(folder: Path, name: str) -> str:
    path = folder / name
    path.write_text("prompt_tokens,output_tokens\n" + "120,20\n150,30\n" * 35)
    return str(path)


def shouting(_: pd.DataFrame) -> Figure:
    raise ZeroDivisionError


def unlaid(_: pd.DataFrame) -> Figure:
    figure = Figure()
    figure.suptitle(r"$\unknown$")
    return figure


def too_large(_: pd.DataFrame) -> Figure:
    return Figure(figsize=(5000, 5000))


def unsaved(_: pd.DataFrame) -> Figure:
    class Shy(Figure):
        def savefig(self, *_: object, **__: object) -> None:
            raise MemoryError

    return Shy()


@pytest.mark.parametrize("draw", [shouting, unlaid, too_large, unsaved])
def test_a_run_whose_figure_fails_is_whole_but_for_it_and_says_so(
    draw: Callable, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory_waste, "draw", draw)
    with pytest.raises(UserError, match="no figure"):
        cli._run(compose_run(*SMALL), list(SMALL), [0])
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == f"results: {(runs / 'latest').resolve()}"
    assert "Error at /" in said.err
    assert "Traceback" not in said.err
    assert {path.name for path in (runs / "latest").iterdir()} >= {"summary.csv", "requests.parquet", "config.yaml"}
    assert not list((runs / "latest").glob("figure.*"))
    assert len(read_frames(runs / "latest")["requests"])


NAMES = ["a$b$.csv", r"$\frac{.csv", "a_b^c.csv", r"back\slash.csv", "50%.csv", r"\$.csv", "$.csv", "{x}#~&.csv"]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_may_be_called_anything_and_is_drawn_as_it_is_called(name: str, tmp_path: Path) -> None:
    run = compose_run("experiment=trace_lengths", "params.traces=[sharegpt]", f"trace.path={own_file(tmp_path, name)}")
    outcome = carry_out(run, Recorder(run.experiment, run.plain()))
    shown = {text._preprocess_math(text.get_text()) for text in outcome.figure.findobj(Text)}
    assert any(name in text and not is_math for text, is_math in shown)
    assert any(name in setup for setup in outcome.summary.setup), "the table has the name itself"


def test_a_sweeps_label_may_hold_anything() -> None:
    row = dict.fromkeys(COLUMNS, "-") | {
        "paper": "kvarena", "panel": "s", "setup": "s [a$b$]", "system": "paged [trace.path=$a_1$]", "x": float("nan"),
        "label": "paged [trace.path=$a_1$]", "allocator": "paged", "quantity": "share_of_kv_memory:token_states",
        "value": 1.0, "ci_low": float("nan"), "ci_high": float("nan"), "n": 1, "clock": "modelled",
    }  # fmt: skip
    figure = registry.drawn("memory_waste", pd.DataFrame([row], columns=COLUMNS))
    shown = [text._preprocess_math(text.get_text()) for text in figure.findobj(Text)]
    assert ("paged [trace.path=$a_1$]", False) in [(text.replace("\n", " "), is_math) for text, is_math in shown]


PRINTING = """
import sys
from kvarena.experiments.command.streams import all_is_said, make_lasting, say
make_lasting()
print("early", file=sys.stderr)
print("2±1 \\udcff" * 9999)
say("results: here")
sys.exit(0 if all_is_said() else 1)
"""


def printing(**more: object) -> subprocess.CompletedProcess[str]:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | more
    return subprocess.run([sys.executable, "-P", "-c", PRINTING], **options)  # type: ignore[call-overload]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1:strict", "utf-8"])
def test_any_encoding_prints_and_ends_with_the_results(encoding: str) -> None:
    done = printing(
        env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}, encoding=encoding.partition(":")[0]
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "results: here"
    assert done.stdout.startswith("2+-1 \\udcff" if encoding == "ascii" else "2±1 \\udcff")


def test_a_full_disk_behind_standard_output_is_told_and_so_are_the_results() -> None:
    with Path("/dev/full").open("w") as full:
        done = printing(stdout=full)
    assert done.returncode == 1
    assert done.stderr.splitlines()[1] == "results: here"
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


def test_readers_who_leave_end_nothing() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = printing(stdout=writing)
    assert (done.returncode, done.stderr.splitlines()) == (0, ["early", "results: here"])
    done = printing(stderr=writing)
    os.close(writing)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "results: here")


def test_a_slow_reader_of_a_pipe_that_does_not_wait_gets_all() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    process = subprocess.Popen([sys.executable, "-P", "-c", PRINTING], stdout=writing)
    os.close(writing)
    with suppress(subprocess.TimeoutExpired):
        process.wait(0.5)  # the pipe is full by now
    with open(reading, encoding="utf-8") as pipe:
        lines = pipe.read().splitlines()
    assert process.wait(10) == 0
    assert (len(lines[0]), lines[1]) == (len("2±1 \\udcff") * 9999, "results: here")


def test_a_command_in_the_poorest_of_surroundings(tmp_path: Path) -> None:
    """ASCII, a dumb and narrow terminal, no display, a matplotlibrc that wants LaTeX, nowhere to keep fonts."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nbackend: TkAgg\n")
    poor = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TERM": "dumb", "COLUMNS": "10",
            "MPLBACKEND": "no_such_backend", "MATPLOTLIBRC": str(tmp_path), "DISPLAY": ""}  # fmt: skip
    path = own_file(tmp_path, "a$_b$.csv")
    command = [sys.executable, "-P", "-m", "kvarena", *SMALL, f"trace.path={path}"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | poor, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.splitlines()[-1].removeprefix("results: "))
    assert (folder / "figure.png").stat().st_size > 10_000
