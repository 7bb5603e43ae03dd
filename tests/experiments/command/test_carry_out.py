"""A run that fails after it has measured: what is kept, and where the same command goes on."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from tiny import TINY

from kvarena.errors import UserError
from kvarena.experiments.command import registry
from kvarena.experiments.command.carry_out import carry_out, resolved_in, summarize
from kvarena.experiments.command.compose import compose_run
from kvarena.experiments.kit.replay import Replayer
from kvarena.experiments.pagedattention import memory_waste
from kvarena.harness.record.record import Recorder, read_frames

SMALL = ("experiment=memory_waste", *TINY["memory_waste", "modelled"])
QUICK = ("experiment=allocation_bandwidth", "device=cpu", "params.page_groups=[64KB]", "params.pool=1MB",
         "params.run_groups=2", "params.rounds=6")  # fmt: skip
FROM_MEASURING = ("config.yaml", "provenance.json")


def start(*overrides: str) -> Path:
    run = compose_run(*(overrides or SMALL))
    recorder = Recorder(run.experiment, run.plain())
    return recorder.finish(carry_out(run, recorder))


def fail(*_: object, **__: object) -> pd.DataFrame:
    raise ZeroDivisionError("planted")


def badly_lettered(_: pd.DataFrame) -> Figure:
    figure = Figure()
    figure.suptitle(r"$\unknown$")  # no fault until it is laid out
    return figure


def test_a_fault_in_the_summary_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVARENA_RUNS", str(tmp_path))
    unfinished = tmp_path / "memory_waste" / ".unfinished"
    with monkeypatch.context() as mended:
        mended.setattr(memory_waste, "summarize", fail)
        with pytest.raises(ZeroDivisionError):
            start()
    (kept,) = unfinished.glob("*-measured")
    assert str(kept) in capsys.readouterr().err
    assert not list((tmp_path / "memory_waste").glob("2*")), "nothing half-written"
    frames = read_frames(kept)
    assert len(frames["averages"]) == 3 * 3

    outcome = summarize(kept)
    assert len(outcome.summary) == len(pd.read_csv(kept / "summary.csv")) > 100
    assert (kept / "figure.png").stat().st_size > 10_000

    monkeypatch.setattr(Replayer, "serve", fail)  # nothing is measured again
    folder = start()
    for name, table in read_frames(folder).items():
        pd.testing.assert_frame_equal(table, frames[name])
    pd.testing.assert_frame_equal(pd.read_csv(folder / "summary.csv"), outcome.summary.reset_index(drop=True))
    assert not list(unfinished.iterdir())


@pytest.mark.parametrize("fault", [fail, badly_lettered])
def test_a_run_that_cannot_be_drawn_is_finished_without_its_figure(
    fault: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVARENA_RUNS", str(tmp_path))
    with monkeypatch.context() as mended:
        mended.setattr(memory_waste, "draw", fault)
        folder = start()
    assert "cannot be drawn" in capsys.readouterr().err
    assert (tmp_path / "memory_waste" / "latest").resolve() == folder
    assert not (folder / "figure.png").exists()
    kept = (folder / "summary.csv").read_bytes()
    summarize(folder)
    assert (folder / "summary.csv").read_bytes() == kept
    assert (folder / "figure.png").stat().st_size > 10_000


def test_a_finished_run_is_summarised_again_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVARENA_RUNS", str(tmp_path))
    folder = start()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with monkeypatch.context() as full:
        full.setattr(Figure, "savefig", fail)
        with pytest.raises(ZeroDivisionError):
            summarize(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (folder / "summary.csv").write_text("old")
    summarize(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert {*FROM_MEASURING, "summary.csv", "averages.parquet"} <= before.keys()


def test_the_summary_accounts_for_the_trace_and_the_figure_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVARENA_RUNS", str(tmp_path))
    folder = start()
    whole = pd.read_csv(folder / "summary.csv")
    own = registry.own_rows(whole)
    account = whole[len(own) :].set_index("quantity")
    assert account.value["requests_served"] == len(read_frames(folder)["requests"].request_id.unique())
    assert set(account.paper) == {"kvarena"}
    assert set(account.evidence) == {"exact"}
    drawn = list[pd.DataFrame]()
    monkeypatch.setattr(memory_waste, "draw", lambda rows: drawn.append(rows) or Figure())
    summarize(folder)
    assert len(drawn[0]) == len(own) == len(whole) - len(account)


def test_a_run_of_another_machines_gpu_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVARENA_RUNS", str(tmp_path))
    folder = start(*QUICK)
    assert resolved_in(folder).device_name == "cpu"
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("name: cpu\n  kind: cpu", "name: cuda\n  kind: cuda"))
    record = json.loads((folder / "provenance.json").read_text())
    record["machine"]["gpu"] = "NVIDIA H200"
    (folder / "provenance.json").write_text(json.dumps(record))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    assert resolved_in(folder).device_name == "nvidia-h200"


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no config"):
        summarize(tmp_path)
    (tmp_path / "config.yaml").write_text("jobs: {}\n")
    (tmp_path / "jobs").mkdir()
    with pytest.raises(UserError, match="multirun"):
        summarize(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.yaml", "{", "config.yaml: cannot be read"),
        ("config.yaml", "experiment: memory_waste\n", "clock None is none of"),
        ("config.yaml", "experiment: memory_waste\nclock: modelled\n", "lacks 'systems'"),
        ("provenance.json", "junk", "provenance.json: cannot be read"),
        ("averages.parquet", "junk", "a frame cannot be read"),
        ("averages.parquet", None, "averages.parquet is missing"),
    ],
)
def test_a_folder_that_was_damaged_is_told_and_no_traceback(
    name: str, content: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVARENA_RUNS", str(tmp_path))
    file = start() / name
    file.unlink()
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(said)):
        summarize(file.parent)
