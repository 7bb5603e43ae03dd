"""Issue G, number 10: a path is what the user wrote, whatever Hydra's grammar makes of its letters."""

import shlex
import sys
import unicodedata
from pathlib import Path

import pytest

from kvarena.errors import UserError
from kvarena.experiments.command.cli import USER_ERROR, _command, guarded
from kvarena.experiments.command.compose import compose_run
from kvarena.experiments.command.multirun import _choices
from kvarena.experiments.command.paths import parsed, quoted

LETTERS = [*"()=,#[]{}'\"$\\;&*?~%: @!|<>^`+", "\t", "\n", "é", unicodedata.normalize("NFD", "é"), "数据", "😀"]
WORST = "-a (b)='c',[d]{}{e: 1} #f$%\\~é数据.csv"


def as_hydra_reads(argument: str, sweeping: bool = False) -> object:
    [override] = parsed(quoted([argument], sweeping=sweeping))
    if not override.is_sweep_override():
        return override.value()
    return [each.value() for each in parsed(_choices(override))]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(*names: str) -> None:
    for name in names:
        Path(name).write_text("prompt_tokens,output_tokens\n20,5\n30,6\n")


@pytest.mark.parametrize("letter", [*LETTERS, WORST])
@pytest.mark.parametrize("key", ["trace.path", "+trace.prefix_path", "model.checkpoint", "params.paths.alpaca"])
def test_a_file_is_read_under_the_name_it_has(folder: Path, letter: str, key: str) -> None:
    for name in (letter, f"a{letter}b.csv", f"{letter}.csv", f"a{letter}"):
        made(name)
        for path in (name, f"./{name}", str(folder / name)):
            assert as_hydra_reads(f"{key}={path}") == path
            assert as_hydra_reads(f"{key}={path}", sweeping=True) == path


@pytest.mark.parametrize("letter", [*"()=#[{'\";&~!<", "é", "数据"])
def test_a_file_that_does_not_exist_is_missed_by_its_name(folder: Path, letter: str) -> None:
    """Not by a token of Hydra's grammar."""
    assert as_hydra_reads(f"trace.path=none{letter}.csv") == f"none{letter}.csv"


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("'a(b).csv'", "a(b).csv"),
        ('"数据.csv"', "数据.csv"),
        (r"'it\'s.csv'", "it's.csv"),
        ("null", None),
        ("${oc.env:HOME}/é.csv", "${oc.env:HOME}/é.csv"),
        ("owner/name", "owner/name"),
    ],
)
def test_what_hydra_reads_already_stays(folder: Path, written: str, read: str | None) -> None:
    assert as_hydra_reads(f"trace.path={written}") == read
    assert as_hydra_reads(f"trace.path={written}", sweeping=True) == read


@pytest.mark.parametrize(
    ("written", "values"),
    [
        ("a.csv,b.csv", ["a.csv", "b.csv"]),
        ("é.csv,b.csv", ["é.csv", "b.csv"]),
        ("b.csv,one,two.csv,é.csv", ["b.csv", "one,two.csv", "é.csv"]),
        ("one,two.csv,three,four.csv", ["one,two.csv", "three,four.csv"]),
        ("'é.csv',\"b,c\",x(1).csv", ["é.csv", "b,c", "x(1).csv"]),
        ("choice(a.csv,b.csv)", ["a.csv", "b.csv"]),
    ],
)
def test_a_comma_parts_paths_where_it_is_in_no_name(folder: Path, written: str, values: list[str], capfd) -> None:
    made("one,two.csv", "three,four.csv", "b.csv")
    assert as_hydra_reads(f"trace.path={written}", sweeping=True) == values
    joined = [name for name in values if name in ("one,two.csv", "three,four.csv")]
    assert [line.partition(": ")[2].split(" exists")[0] for line in capfd.readouterr().err.splitlines()] == joined


def test_each_path_of_a_mapping_is_quoted(folder: Path) -> None:
    made("a, b.csv", "é.csv")
    assert as_hydra_reads("params.paths={alpaca: a, b.csv, sharegpt: é.csv, wmt16: null}") == {
        "alpaca": "a, b.csv",
        "sharegpt": "é.csv",
        "wmt16": None,
    }


def test_the_whole_way_of_the_worst_name(folder: Path) -> None:
    made(WORST)
    run = compose_run("experiment=serving_latency", f"trace.path={WORST}", "params.paths={alpaca: " + WORST + "}")
    assert (run.trace.path, run.plain()["params"]["paths"]["alpaca"]) == (WORST, WORST)
    assert WORST in run.files


def test_elsewhere_the_form_to_type_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    assert guarded(lambda: _command(["experiment=memory_waste", "trace.name=é (1)"])) == USER_ERROR
    said = capfd.readouterr().err
    [form] = shlex.split(said[said.index("quotes: ") :].removeprefix("quotes: "))
    assert as_hydra_reads(form) == "é (1)"


@pytest.mark.parametrize("path", ["${nobody}", "${oc.env:NOBODY_SET_THIS}/a", "${", "a${b", "\udcff"])
@pytest.mark.parametrize("exists", [True, False])
def test_what_cannot_be_said_is_refused(folder: Path, path: str, exists: bool) -> None:
    if exists:
        (folder / path).parent.mkdir(exist_ok=True)
        made(path)
    with pytest.raises(UserError, match=r"trace\.path"):
        compose_run("experiment=memory_waste", f"trace.path={path}")


def test_a_multirun_with_results_in_a_folder_of_any_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra's own override, hydra.sweep.dir, names that folder."""
    runs = folder / "a (b)=c,d #e%f 'é数据' [x]{y}$z;&~"
    monkeypatch.setenv("KVARENA_RUNS", str(runs))
    monkeypatch.setenv("KVARENA_SWEEP", "")  # set by a sweep: give it back
    monkeypatch.setattr(sys, "argv", ["kvarena"])
    made("-a (b)='c',[d] é.csv")
    small = ("systems=[paged]", "arrival.duration_s=1", "params.window_s=[0,1]", "params.seeds=[0]")
    _command(["-m", "experiment=memory_waste", "trace.path=-a (b)='c',[d] é.csv", *small])
    assert (runs / "memory_waste" / "latest" / "summary.csv").is_file()
