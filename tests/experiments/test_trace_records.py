"""What a run records of its traces: of every replay, of the trace alone, and the same where it was continued."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from tiny import TINY, Unwritten, resolved

from kvarena.experiments.command import registry
from kvarena.experiments.command.carry_out import REFUSALS, TRACES, carry_out, measure, summary_of
from kvarena.harness.accounts import replays
from kvarena.harness.record.record import Frames, Measured, Recorder
from kvarena.harness.run.run import Run

PAIRS = [pair for pair in TINY if "trace" in registry.get(pair[0]).READS[pair[1]]]

UNSERVED = (("trace_lengths", "modelled"), ("memory_layout", "modelled"), ("decode_throughput", "measured"))  # counted


class Continued(Recorder):
    """Goes on where another run ended, and has nothing left to measure."""

    def cell(self, key: str, measure: Callable[[], Frames]) -> Frames:
        return super().cell(key, lambda: pytest.fail(f"{key} is measured again"))


class Killed(Recorder):
    """Ends with its first cell."""

    def cell(self, key: str, measure: Callable[[], Frames]) -> Frames:
        super().cell(key, measure)
        raise KeyboardInterrupt


def records_of(run: Run, recorder: Recorder, capsys: pytest.CaptureFixture[str]) -> tuple[Measured, list[str]]:
    """What a run measures, and the lines that it says of its traces."""
    capsys.readouterr()
    measured = measure(run, recorder)
    return measured, [line for line in capsys.readouterr().err.splitlines() if line.startswith("trace ")]


def same_records(run: Run, one: Measured, other: Measured) -> pd.DataFrame:
    """Assert that both say the same of all traces, and make the same rows; returns those of the traces."""
    assert one.notes["traces"] == other.notes["traces"]
    pd.testing.assert_frame_equal(one.frames[TRACES], other.frames[TRACES])
    summary = summary_of(run, one.frames)
    pd.testing.assert_frame_equal(summary_of(run, other.frames), summary)
    return summary[summary.label.str.startswith(replays.ACCOUNT)]


@pytest.mark.parametrize(("experiment", "clock"), PAIRS)
def test_a_run_whose_cells_are_read_back_tells_and_records_the_same(
    experiment: str, clock: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVARENA_RUNS", str(tmp_path))
    run = resolved(experiment, clock)
    first, lines = records_of(run, Recorder(experiment, run.plain()), capsys)
    run = resolved(experiment, clock)
    again, lines_again = records_of(run, Continued(experiment, run.plain()), capsys)
    assert lines == lines_again != []
    rows = same_records(run, first, again)
    assert set(rows.model) == {"-"}, "an account is of the trace, whichever models serve it"
    assert not rows.setup.str.contains(run.model.name).any()
    if (experiment, clock) not in UNSERVED:
        refused = summary_of(run, first.frames).query("quantity == 'refused'")
        assert {system.allocator.name for system in run.systems} <= set(refused.allocator), "each system has its row"
        assert set(refused.value) == {0}
        pd.testing.assert_frame_equal(first.frames[REFUSALS], again.frames[REFUSALS])


def test_a_run_that_was_killed_in_the_middle_records_what_a_whole_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVARENA_RUNS", str(tmp_path))
    arguments = ("page_group_size", "modelled", "params.seeds=[0,1,2,3]")
    run = resolved(*arguments, without=("params.seeds",))
    whole, lines = records_of(run, Unwritten(), capsys)
    with pytest.raises(KeyboardInterrupt):
        measure(run, Killed(run.experiment, run.plain()))
    run = resolved(*arguments, without=("params.seeds",))
    continued, lines_again = records_of(run, Recorder(run.experiment, run.plain()), capsys)
    assert lines == lines_again
    quantities = same_records(run, whole, continued).quantity
    assert "requests_served:largest" in set(quantities), "of four seeds"


def test_a_file_that_the_highest_rate_repeats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVARENA_RUNS", str(tmp_path))
    own = tmp_path / "own20.csv"
    own.write_text("prompt_tokens,output_tokens\n" + "20,5\n" * 20)
    panels: dict[str, Any] = {"model": "opt-13b", "device": "a100-40gb", "trace": "sharegpt", "duration_s": 4}
    said = ", ".join(f"{key}: {value}" for key, value in panels.items())
    run = resolved(
        "serving_latency", "modelled", "systems=[paged]", f"trace.path={own}",
        f"params.panels={{fig12a: {{{said}, rates: {{others: [2.0, 64.0]}}}}}}",
    )  # fmt: skip
    capsys.readouterr()
    recorder = Recorder(run.experiment, run.plain())
    folder = recorder.finish(carry_out(run, recorder))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trace ")]
    assert len(lines) == 2
    assert "first 4 of 20 taken" in lines[0], "at 2/s, and at no rate that is not replayed"
    summary = pd.read_csv(folder / "summary.csv")
    value = summary[summary.label.str.startswith("trace ")].set_index("quantity").value
    largest = int(value["requests_served:largest"])
    assert f"repeated to {largest} ({-(-largest // 20)} rounds)" in lines[1]
    assert value["requests_repeated:largest"] == largest - 20 > 200
    assert (value["requests_served:smallest"], value["requests_repeated:smallest"]) == (4, 0)
    [kept] = json.loads((folder / "provenance.json").read_text())["traces"]
    assert f"requests repeated 0 to {largest - 20}" in kept


def test_each_number_of_a_line_is_of_what_the_one_before_has_left(capsys: pytest.CaptureFixture[str]) -> None:
    _, [line] = records_of(resolved("decode_throughput", "measured"), Unwritten(), capsys)
    found = re.search(
        r": (\d+) drawn within 512 tokens \(filter \w+\), (\d+) cut to 512 in all, (\d+) prompts over 504 left out, "
        r"first 2 of (\d+) served, ",
        line,
    )
    assert found, line
    drawn, cut, left_out, left = map(int, found.groups())
    assert drawn == 1000 == left_out + left
    assert cut <= drawn
