"""A run knows what its files hold: nothing that was measured of another content is taken for its own."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pandas as pd
import pytest
from matplotlib.figure import Figure
from omegaconf import DictConfig
from safetensors.torch import save_file

from kvarena.errors import UserError
from kvarena.experiments.command import cli, sweep
from kvarena.experiments.command.carry_out import carry_out
from kvarena.experiments.command.compose import compose_run
from kvarena.experiments.kit.replay import Replayer
from kvarena.experiments.pagedattention import memory_waste, trace_lengths
from kvarena.harness.files import content
from kvarena.harness.model import load_preset
from kvarena.harness.record.record import Recorder, read_frames
from kvarena.harness.run import contents
from kvarena.harness.trace import TraceConfig, load_trace, reading

SMALL = ("experiment=memory_waste", "systems=[orca-max,paged,vattention-64kb]", "arrival.rate=60",
         "arrival.duration_s=1", "params.window_s=[0,8]", "params.seeds=[0]")  # fmt: skip
LENGTHS = "experiment=trace_lengths"


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVARENA_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("KVARENA_SWEEP", "")
    monkeypatch.delenv("KVARENA_SWEEP")  # a sweep sets it: given back at the end
    monkeypatch.setattr(memory_waste, "draw", lambda _: Figure())
    return tmp_path / "runs" / "memory_waste"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes lengths of one prompt; returns the file's path."""

    def lengths(prompt: int, name: str = "own.csv") -> str:
        path = tmp_path / name
        path.write_text("prompt_tokens,output_tokens\n" + f"{prompt},20\n" * 80)
        return str(path)

    return lengths


def start(*overrides: str) -> Path:
    run = compose_run(*overrides)
    recorder = Recorder(run.experiment, run.plain())
    return recorder.finish(carry_out(run, recorder))


def prompts(folder: Path) -> dict[str, float]:
    """Mean prompt by system."""
    requests = read_frames(folder)["requests"]
    return {str(system): float(rows.prompt_tokens.mean()) for system, rows in requests.groupby("system")}


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a command until it has served so many systems."""

    def begin(served: int, *overrides: str) -> None:
        whole, count = Replayer.serve, iter(range(served))

        def serve(self: Replayer, *arguments: Any, **more: Any) -> Any:
            if next(count, None) is None:
                raise KeyboardInterrupt
            return whole(self, *arguments, **more)

        with monkeypatch.context() as here:
            here.setattr(Replayer, "serve", serve)
            with pytest.raises(KeyboardInterrupt):
                start(*overrides)

    return begin


def test_a_run_goes_on_only_where_its_file_holds_the_same(
    write: Callable[..., str], killed: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(120)
    killed(1, *SMALL, f"trace.path={path}")
    write(480)
    folder = start(*SMALL, f"trace.path={path}")
    assert set(prompts(folder).values()) == {480}
    assert "read back" not in capsys.readouterr().err
    assert "read_back" not in json.loads((folder / "provenance.json").read_text())


def test_what_is_read_back_is_said(
    write: Callable[..., str], killed: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(120)
    killed(2, *SMALL, f"trace.path={path}")
    os.utime(path)  # touched, not changed
    folder = start(*SMALL, f"trace.path={path}")
    (line,) = (each for each in capsys.readouterr().err.splitlines() if "read back" in each)
    assert "2 cells" in line
    said = json.loads((folder / "provenance.json").read_text())["read_back"]
    assert all(cell in line and when in line for cell, when in said.items())
    assert set(prompts(folder).values()) == {120}


def test_a_file_that_changes_during_a_cell_ends_the_run_and_the_cell_is_not_kept(
    write: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(120)
    whole, count = Replayer.serve, iter(range(9))

    def serve(self: Replayer, *arguments: Any, **more: Any) -> Any:
        if next(count) == 1:
            write(480)
        return whole(self, *arguments, **more)

    with monkeypatch.context() as here:
        here.setattr(Replayer, "serve", serve)
        with pytest.raises(UserError, match=r"own\.csv: was changed"):
            start(*SMALL, f"trace.path={path}")
    assert set(prompts(start(*SMALL, f"trace.path={path}")).values()) == {480}
    write(120)  # back again: of the first cell alone it is known that it was measured of this
    run = compose_run(*SMALL, f"trace.path={path}")
    again = Recorder(run.experiment, run.plain())
    again.cell("0-orca-max", lambda: pytest.fail("measured again"))
    with pytest.raises(ZeroDivisionError):
        again.cell("0-paged", lambda: {"steps": pd.DataFrame({"a": [1 / 0]})})


@pytest.mark.parametrize("gone", [False, True])
def test_a_file_that_changes_between_resolving_and_reading_ends_the_run(gone: bool, write: Callable[..., str]) -> None:
    path = write(120)
    for overrides in (SMALL, (LENGTHS, "params.traces=[sharegpt]")):
        write(120)
        run = compose_run(*overrides, f"trace.path={path}")
        write(480)
        if gone:
            Path(path).unlink()
        with pytest.raises(UserError, match=r"own\.csv"):
            carry_out(run, Recorder(run.experiment, run.plain()))


def test_a_file_that_changes_while_it_is_read_is_no_trace(
    write: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, whole = write(120), reading._read_file

    def read(*arguments: Any) -> Any:
        write(480)
        return whole(*arguments)

    monkeypatch.setattr(reading, "_read_file", read)
    with pytest.raises(UserError, match="was changed"):
        load_trace(TraceConfig(path=path))


def test_a_change_of_the_same_size_and_time_is_seen(write: Callable[..., str]) -> None:
    path = Path(write(120))
    before = content.sha256(path)
    os.utime(path, (1, 1))
    assert content.sha256(path) == before
    write(480)
    os.utime(path, (1, 1))
    assert content.sha256(path) != before


def texts(folder: Path) -> tuple[str, ...]:
    (folder / "wmt.jsonl").write_text('{"translation": {"en": "a b", "de": "c d"}}\n')
    (folder / "examples.json").write_text('{"prefixes": {"1": {"text": "e f"}}}')
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    (folder / "tokenizer" / "vocab.txt").write_text("a")
    return ("experiment=shared_prefix", "params.only=[fig16a]", f"trace.path={folder}/wmt.jsonl",
            f"trace.prefix_path={folder}/examples.json", f"trace.tokenizer={folder}/tokenizer")  # fmt: skip


def texts_beside(folder: Path) -> tuple[str, ...]:
    overrides = texts(folder)
    (folder / "examples.json").rename(folder / "wmt16_prefix.json")
    return tuple(each for each in overrides if "prefix_path" not in each)


def several(folder: Path) -> tuple[str, ...]:
    (folder / "other.csv").write_text("prompt_tokens,output_tokens\n7,8\n")
    return LENGTHS, "params.traces=[alpaca]", f"params.paths.alpaca={folder}/other.csv"


def weights(folder: Path) -> tuple[str, ...]:
    tiny = load_preset("tiny-opt")
    (folder / "model").mkdir()
    sizes = {"model_type": "opt", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "ffn_dim": 256,
             "vocab_size": tiny.vocab_size, "max_position_embeddings": 2048}  # fmt: skip
    (folder / "model" / "config.json").write_text(json.dumps(sizes))
    save_file({}, folder / "model" / "model.safetensors")
    return (
        "experiment=memory_waste",
        "clock=measured",
        "device=cpu",
        "model=checkpoint",
        f"model.checkpoint={folder}/model",
    )


@pytest.mark.parametrize(
    ("written", "changed"),
    [
        (texts, "wmt.jsonl"), (texts, "examples.json"), (texts, "tokenizer/tokenizer.json"),
        (texts, "tokenizer/added_tokens.json"), (texts_beside, "wmt16_prefix.json"), (several, "other.csv"),
        (weights, "model/model.safetensors"), (weights, "model/config.json"),
    ],
)  # fmt: skip
def test_every_file_that_a_run_reads_is_of_its_identity(
    written: Callable[[Path], tuple[str, ...]], changed: str, tmp_path: Path
) -> None:
    overrides = written(tmp_path)
    before = compose_run(*overrides)
    assert compose_run(*overrides).plain() == before.plain()
    with (tmp_path / changed).open("a") as file:
        file.write("\n")
    after = compose_run(*overrides)
    assert str(tmp_path / changed) in after.files
    assert after.plain() != before.plain()
    content.check_unchanged(after.files)
    if changed in before.files:
        with pytest.raises(UserError, match="was changed"):
            content.check_unchanged(before.files)


def test_a_tokenizer_in_a_models_folder_does_not_read_its_weights(tmp_path: Path) -> None:
    overrides = texts(tmp_path)
    (tmp_path / "tokenizer" / "model.safetensors").touch()
    assert not [path for path in compose_run(*overrides).files if path.endswith("safetensors")]


def test_a_kernels_library_that_a_variable_names_is_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "fa3.so"
    library.touch()
    monkeypatch.setenv("KVARENA_FA3_SO", str(library))
    run = compose_run("experiment=memory_waste", "clock=measured", "device=cpu")
    assert contents.contents(run) == {}, "its kernels need none"
    with_library = replace(run, systems=(replace(run.systems[0], kernel=SimpleNamespace(name="fa3")),))
    assert list(contents.contents(with_library)) == [str(library)]


def test_a_name_on_the_hub_is_known_by_its_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {("some/data", "dataset"): "0123", ("some/tokenizer", "model"): None}
    monkeypatch.setattr(contents, "_revision", lambda name, kind: answers[name, kind])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("nothing is loaded to resolve"))
    run = compose_run(LENGTHS, "params.traces=[sharegpt]", "trace.path=some/data", "trace.tokenizer=some/tokenizer")
    assert run.files == {"some/data": "revision 0123"}
    content.check_unchanged(run.files)


@pytest.fixture
def swept(write: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Counts one file twice, by two jobs of a sweep, as the command line does; its status.

    meanwhile: what happens before the second job.
    """
    monkeypatch.setattr(trace_lengths, "draw", lambda _: Figure())
    overrides = [LENGTHS, "params.traces=[sharegpt]", f"trace.path={tmp_path}/own.csv", "params.num_bins=16,32"]
    whole = cli._job

    def sweep_it(meanwhile: Callable[[], object] = lambda: None) -> int:
        def job(config: DictConfig, own: list[str]) -> None:
            if "params.num_bins=32" in own:
                meanwhile()
            whole(config, own)

        monkeypatch.setattr(cli, "_job", job)
        monkeypatch.setattr("sys.argv", ["kvarena"])
        try:
            return cli.guarded(lambda: cli._command(["-m", *overrides]))
        except SystemExit as left:
            return int(left.code or 0)

    return sweep_it


def means(folder: Path) -> set[float]:
    """Mean prompts of all jobs of the last sweep."""
    table = read_frames(folder)["statistics"]
    return set(table[table.side == "input"].mean_length)


def killed_now() -> None:
    raise KeyboardInterrupt


def test_jobs_of_a_killed_sweep_go_on_only_where_their_file_holds_the_same(
    swept: Callable[..., int], write: Callable[..., str], tmp_path: Path
) -> None:
    write(120)
    assert swept(killed_now) == cli.INTERRUPTED
    write(480)
    assert swept() == 0
    folder = tmp_path / "runs" / "trace_lengths" / "latest"
    assert [means(job) for job in (folder / "jobs").iterdir()] == [{480}, {480}]
    assert means(folder) == {480}


def test_a_file_that_changes_between_two_jobs_makes_no_table(
    swept: Callable[..., int], write: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(120)
    assert swept(lambda: write(480)) == cli.USER_ERROR
    assert "own.csv: was changed" in capsys.readouterr().err
    folder = tmp_path / "runs" / "trace_lengths" / "latest"
    assert not folder.exists()
    assert swept() == 0
    assert means(folder) == {480}


@pytest.fixture(autouse=True)
def unswept() -> Iterator[None]:
    yield
    os.environ.pop(sweep._VARIABLE, None)
