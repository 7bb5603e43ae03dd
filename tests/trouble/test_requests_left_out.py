"""No request is left out for the sake of a paper whose trace it is not, and none without a word."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kvarena.harness.accounts.trace_account import account_of
from kvarena.harness.trace import TraceConfig, load_trace

COUNTS = "histogram_count_vs_bin_left"
LONG = ("900,100", "3000,20", "15000,300")  # two beyond PagedAttention's 2,048


def counted(done) -> dict[str, float]:
    rows = done.summary[done.summary.quantity == COUNTS]
    return rows.groupby("label").value.sum().to_dict()


@pytest.mark.parametrize("trace", ["sharegpt", "azure_code", "sharegpt_v3"])
def test_somebodys_file_is_counted_whole_whatever_the_trace_is_called(trace: str, ran: Callable, own: Callable) -> None:
    done = ran("trace_lengths", f"trace={trace}", f"params.traces=[{trace}]", f"trace.path={own(*LONG)}")
    assert done.value("mean_length") == {"input": 6300, "output": 140}
    assert counted(done) == {"input": 3, "output": 3}
    assert set(done.summary.paper) == {"kvarena"}, "exact, and nobody's figure"


def test_only_the_traces_of_a_figure_have_its_filter(ran: Callable) -> None:
    done = ran("trace_lengths", "trace=azure_code", "params.traces=[azure_code,sharegpt]")
    means = done.summary[(done.summary.quantity == "mean_length") & (done.summary.label == "input")]
    code, sharegpt = means.value
    assert code == pytest.approx(2048, rel=0.02), "as Azure's code was published; 831 of what lies below 2,048"
    assert sharegpt == pytest.approx(161.3, rel=0.02)


def test_bins_that_are_asked_for_say_what_lies_outside(ran: Callable, own: Callable) -> None:
    bins = "params.bins={sharegpt: {prompt: [1, 2028], output: [1, 200]}}"
    done = ran("trace_lengths", "params.traces=[sharegpt]", f"trace.path={own(*LONG)}", bins)
    assert counted(done) == {"input": 1, "output": 2}
    assert done.value("records_outside_of_bins") == {"input": 2, "output": 1}
    assert "2 of 3 input lengths lie outside of [1, 2028]" in done.err
    assert done.value("mean_length")["input"] == 6300, "a mean is of all"


def test_a_file_is_not_repeated_to_a_papers_number(ran: Callable, own: Callable) -> None:
    path, overrides = own("900,10", "800,20", "700,30"), ("systems=[paged-fa2]", "model=yi-6b")
    done = ran("offline_throughput", f"trace.path={path}", *overrides)
    assert list(done.value("requests_served").values()) == [3]
    assert not done.value("requests_repeated")
    done = ran("offline_throughput", f"trace.path={path}", "trace.num_requests=7", *overrides)
    assert list(done.value("requests_repeated").values()) == [4], "as was asked for"
    assert "4 requests are repeats" in done.words
    assert "4 requests are repeats" in done.out
    done = ran("offline_throughput", f"trace.path={path}", "trace.num_requests=7", "trace.repeat=false", *overrides)
    assert list(done.value("requests_served").values()) == [3]


def test_what_arrives_for_so_long_repeats_a_file_and_the_figure_says_so(ran: Callable, own: Callable) -> None:
    panel = "{fig12a: {model: opt-13b, device: a100-40gb, trace: sharegpt, duration_s: 9, rates: {others: [2.0]}}}"
    done = ran("serving_latency", "systems=[paged]", "params.crossing=[]", "params.seeds=[0]",
               f"params.panels={panel}", f"trace.path={own('90,10', '80,20')}")  # fmt: skip
    [served], [repeated] = (list(done.value(f"requests_{what}").values()) for what in ("served", "repeated"))
    assert repeated == served - 2 > 5
    assert f"own.csv: {repeated:.0f} requests are repeats" in done.words


def test_a_file_is_gone_through_once_however_many_arrive(ran: Callable, own: Callable) -> None:
    keys = ("systems=[paged]", f"trace.path={own('100,20', '50,10')}", "trace.num_requests=5", "arrival.duration_s=5")
    assert list(ran("memory_waste", *keys, "trace.repeat=false").value("requests_served").values()) == [2]
    assert list(ran("memory_waste", *keys).value("requests_served").values()) == [5]


def test_recorded_arrivals_of_a_short_file_are_its_own(ran: Callable, own: Callable) -> None:
    """A paper's number of requests does not turn them into drawn ones."""
    rows = ("90,10,0", "80,20,2", "70,5,4")
    done = ran("memory_timeline", "systems=[paged]", "params.samples=3",
               f"trace.path={own(*rows, header='prompt_tokens,output_tokens,arrival_s')}")  # fmt: skip
    assert "arrivals: recorded, over 4 s (the file's own)" in done.err


def test_conversations_are_all_counted(ran: Callable, tmp_path: Path) -> None:
    path = tmp_path / "turns.json"
    turns = [{"prompt_tokens": 10 * n, "output_tokens": 5, "conversation_id": n // 2} for n in range(1, 9)]
    path.write_text(json.dumps(turns))
    done = ran("trace_lengths", "params.traces=[sharegpt]", f"trace.path={path}")
    assert done.value("num_records") == {"input": 8, "output": 8}
    assert counted(done) == {"input": 8, "output": 8}


@pytest.mark.parametrize(
    ("text", "not_read"),
    [
        ("prompt_tokens,output_tokens,timestamp,note\n10,5,1,a\n20,6,2,b\n", ["timestamp", "note"]),
        ('{"prompt_tokens": 10, "output_tokens": 5}\n{"prompt_tokens": 10, "output_tokens": 5, "turn": 2}\n', ["turn"]),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,10,5\n", []),
        ("prompt_tokens,output_tokens," + ",".join(f"c{i}" for i in range(20)) + "\n10,5" + ",0" * 20 + "\n", None),
    ],
)
def test_fields_that_nothing_is_read_of_are_said(tmp_path: Path, text: str, not_read: list[str] | None) -> None:
    """A stamp under a name that the format does not know would else pass for a file without stamps."""
    path = tmp_path / "own.trace"
    path.write_text(text)
    config = TraceConfig("own", path=str(path))
    account = account_of(config, load_trace(config))
    assert account.not_read == (not_read if not_read is not None else [f"c{i}" for i in range(20)])
    assert all(name in str(account) for name in account.not_read[:8])
