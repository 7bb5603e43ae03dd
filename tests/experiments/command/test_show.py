"""What a run prints, and the tables of `./run.sh kernels`: nothing is markup, no name is cut."""

import io
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from kvarena.experiments.command import show
from kvarena.experiments.command.kernel_matrix import print_matrix
from kvarena.experiments.kit.tables import Grid, print_grid
from kvarena.harness.record.progress import Progress
from kvarena.harness.record.record import Measured, Outcome
from kvarena.harness.record.summary import COLUMNS
from kvarena.kernels.registry import kernel_names, kernel_spec, missing

ROW = dict.fromkeys(COLUMNS, "-") | {
    "paper": "kvarena", "figure": "f", "panel": "p", "system": "paged/numba", "label": "paged/numba", "quantity": "q",
    "x": 1.0, "value": 2.0, "unit": "s", "n": 1, "ci_low": float("nan"), "ci_high": float("nan"), "clock": "modelled",
    "device": "a100", "evidence": "predicted",
}  # fmt: skip
MANY = [f"system-number-{number}/kernel" for number in range(12)]


def printed(capsys: pytest.CaptureFixture[str], tmp_path: Path, *rows: dict, headline: str = "q") -> str:
    table = pd.DataFrame([ROW | row for row in rows], columns=COLUMNS)
    show.outcome(Outcome(Measured({}), table, headline), tmp_path)
    return capsys.readouterr().out


def drawn(width: int, lines: list[str], heads: list[str]) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    cells = {(line, head): f"{i}.{j}" for i, line in enumerate(lines) for j, head in enumerate(heads)}
    print_grid(console, "title", Grid("system", lines, heads, cells))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize("label", ["paged [64KB]/numba", "[gpu]", "[bold]x[/bold]", "a :smile: b", r"\[64KB]"])
def test_data_is_no_markup(label: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert label in printed(capsys, tmp_path, {"system": label, "label": label})
    Progress("demo", 1).stage(label)
    assert label in capsys.readouterr().err


@pytest.mark.parametrize("heads", [["1", "2"], ["external fragmentation and others", "2"], MANY])
@pytest.mark.parametrize("lines", [MANY, ["vattention{page_group: 64KB, tensor_slicing: True}/numba"]])
@pytest.mark.parametrize("width", [30, 60, 80, 150])
def test_every_text_is_whole_and_no_line_is_wider_than_the_terminal(
    width: int, lines: list[str], heads: list[str]
) -> None:
    output = drawn(width, lines, heads)
    assert max(map(len, output)) <= width
    assert "…" not in "".join(output)
    words = {word for text in (*lines, *heads) for word in text.split()}
    if width >= 60:
        missed = [word for word in words if not any(word in line for line in output)]
        assert not missed
    assert all(any(f"{i}.{j}" in line for line in output) for i in range(len(lines)) for j in range(len(heads)))


def test_kernels_say_how_to_install_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvarena.experiments.command.kernel_matrix.missing", lambda spec: "pip install -e '.[gpu]'")
    print_matrix()
    output = capsys.readouterr().out
    assert "'.[gpu]'" in output
    assert all(name in output for name in kernel_names())
    assert missing(kernel_spec("numba")) is None


def test_a_replayed_system_says_so_and_ours_stand_apart(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "points.parquet")
    earned = {"paper": "pagedattention", "figure": "fig2", "panel": "OPT-13B", "system": "vLLM"}
    output = printed(capsys, tmp_path, earned | {"evidence": "calibrated"}, {"n": 6, "ci_low": 1.0, "ci_high": 3.0})
    assert "vLLM, replayed" in output
    assert "pagedattention fig2, OPT-13B" in output
    assert "2±1" in output
    assert "evidence: calibrated (1), predicted (1); clock: modelled; device: a100" in output
    assert f"{tmp_path / 'summary.csv'}, points.parquet\n" in output


def test_two_rows_of_one_name_are_told_apart(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    earned = {"paper": "pagedattention", "figure": "fig2", "panel": "OPT-13B", "system": "vLLM"}
    output = printed(capsys, tmp_path, earned, earned | {"label": "paged/fa2", "value": 7.0})
    assert "paged/numba" in output
    assert "paged/fa2" in output
    assert "7" in output


def test_a_headline_without_rows_says_what_there_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = printed(capsys, tmp_path, {"quantity": "other:kind"}, headline="wanted")
    assert "wanted" in output
    assert "other" in output
    assert "none at all" in printed(capsys, tmp_path)
