"""A trace of one length, or of one record, is counted and served like any other; what a spread divides has no row."""

from collections.abc import Callable

import numpy as np
import pytest

from kvarena.errors import UserError

TIMED = "prompt_tokens,output_tokens,arrival_s"
COUNTS = "histogram_count_vs_bin_left"
OWN = ("trace=sharegpt", "params.traces=[sharegpt]")


def bins_of(done, side: str) -> dict[float, float]:
    rows = done.summary[(done.summary.quantity == COUNTS) & (done.summary.label == side)]
    return dict(zip(rows.x, rows.value, strict=True))


def test_one_record_is_one_bin(ran: Callable, own: Callable) -> None:
    done = ran("trace_lengths", *OWN, f"trace.path={own('100,20,0', header=TIMED)}")
    assert (bins_of(done, "input"), bins_of(done, "output")) == ({100: 1}, {20: 1})
    assert done.value("mean_length") == {"input": 100, "output": 20}


def test_the_shipped_trace_of_one_length(ran: Callable) -> None:
    done = ran("trace_lengths", "trace=fixed", "params.traces=[fixed]")
    assert (bins_of(done, "input"), bins_of(done, "output")) == ({16384: 1000}, {400: 1000})


@pytest.mark.parametrize(
    ("lengths", "bins"),
    [
        ([5, 6], {5: 2}),  # a token is the narrowest bin: the last holds its own end
        ([16384, 16387], {16384: 1, 16385: 0, 16386: 1}),  # else two bins would begin at one x
        ([1_000_000, 1_000_041], {1_000_000: 1, 1_000_020: 1}),  # of six digits
    ],
)
def test_few_lengths_have_no_more_bins_than_can_be_told_apart(
    lengths: list[int], bins: dict, ran: Callable, own: Callable
) -> None:
    done = ran("trace_lengths", *OWN, f"trace.path={own(*(f'{length},9' for length in lengths))}")
    assert bins_of(done, "input") == bins
    assert bins_of(done, "output") == {9: len(lengths)}


@pytest.mark.parametrize(
    ("experiment", "rows", "overrides"),
    [
        ("memory_waste", ["40,5,0"], ("systems=[paged]",)),
        ("offline_throughput", ["40,5,3"] * 9, ("systems=[paged-fa2]", "model=yi-6b")),
        ("online_latency", ["40,1,0"], ("systems=[paged-fa2]", "model=yi-6b", "params.rates={others: [0.5]}")),
        ("memory_timeline", ["40,1,0"], ("systems=[paged]", "params.samples=2")),
    ],
)
def test_it_is_served(
    experiment: str, rows: list[str], overrides: tuple[str, ...], ran: Callable, own: Callable
) -> None:
    done = ran(experiment, f"trace.path={own(*rows, header=TIMED)}", *overrides)
    assert done.value("requests_served").popitem()[1] == len(rows)
    assert np.isfinite(done.summary.value).all(), "what has no value has no row"


def test_one_request_reaches_a_rate_and_is_asked_at_none(ran: Callable, own: Callable) -> None:
    panel = "{fig12a: {model: opt-13b, device: a100-40gb, trace: sharegpt, duration_s: 2, rates: {others: [0.5]}}}"
    done = ran("serving_latency", "systems=[paged]", "params.crossing=[]", f"params.panels={panel}", "params.seeds=[0]",
               f"trace.path={own('40,5')}")  # fmt: skip
    assert done.value("requests_served").popitem()[1] == 1
    assert set(done.value("finished_vs_rate").values()) == {1}
    assert not done.value("rate_asked_per_s_vs_rate"), "from the first arrival to the last there is no time"


def test_a_cache_that_finds_nothing(ran: Callable, own: Callable) -> None:
    path = own("40,5,1", header="prompt_tokens,output_tokens,conversation_id")
    done = ran("prefix_cache", "systems=[paged]", f"trace.path={path}", "params.capacities_gb=[1]")
    assert set(done.value("hit_ratio_unlimited").values()) == {0}


def test_a_replay_without_a_step_that_decodes(ran: Callable, own: Callable) -> None:
    with pytest.raises(UserError, match="no iteration only decodes"):
        ran("allocation_overlap", "clock=modelled", f"trace.path={own('40,1')}", "model=llama-3-8b")


def test_a_window_that_nobody_asked_for_is_not_what_fails(ran: Callable, own: Callable) -> None:
    path = f"trace.path={own('40,5,0', '40,5,1', header=TIMED)}"
    with pytest.raises(UserError, match=r"params.window_s=\[300.0, 900.0\]: no step begins there"):
        ran("memory_waste", "systems=[paged]", path, "params.window_s=[300,900]")
    done = ran("memory_waste", "systems=[paged]", path)
    assert "params.window_s=[300.0, 900.0] begins after the last request has arrived (1 s)" in done.err
