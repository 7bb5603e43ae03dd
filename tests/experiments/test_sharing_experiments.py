"""Figs 14 to 17 on short traces: which order must come out, what is the paper's and what is ours, and refusals."""

from collections.abc import Callable

import pandas as pd
import pytest

from kvarena.allocators.usage import Usage
from kvarena.errors import UserError
from kvarena.experiments.sharing_savings import savings

CROSSING, LATENCY = "rate_at_0.5_s_per_token", "normalized_latency_vs_rate"
SHORT = ("arrival.duration_s=60", "params.tolerance=0.2", "params.shares=[]")


def crossings(summary: pd.DataFrame, figure: str) -> pd.Series:
    rows = summary[(summary.quantity == CROSSING) & (summary.figure == figure)]
    return rows.set_index("system").value


def test_parallel_sampling(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of("parallel_sampling", "params.only=[fig14b]", "systems=[orca-pow2,orca-oracle,paged]", *SHORT)
    rates = crossings(summary, "fig14b")
    assert rates["Orca(Pow2)"] < rates["Orca(Oracle)"] < rates["vLLM"]
    assert set(summary[summary.paper == "pagedattention"].panel) == {"parallel n=4"}
    assert set(summary.evidence) == {"predicted"}
    points = summary[(summary.quantity == LATENCY) & (summary.system == "vLLM")].sort_values("x")
    assert points.x.iloc[0] < rates["vLLM"] < points.x.iloc[-1]
    below = points[points.x < rates["vLLM"]]
    assert (below.value < 0.5).all()


def test_beams_are_conditional_and_their_band_is_ours(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of("beam_search", "params.only=[fig14e]", "systems=[orca-oracle,paged]", *SHORT)
    rates = crossings(summary, "fig14e")
    assert rates["Orca(Oracle)"] < rates["vLLM"]
    assert set(summary.evidence) == {"conditional"}
    band = summary[(summary.quantity == CROSSING) & (summary.figure == "beam_search")]
    assert set(band.panel) == {"beam w=4, survival one", "beam w=4, survival all"}
    assert set(band.paper) == {"kvarena"}
    assert band.value.min() <= rates["vLLM"] * 1.01
    assert band.value.max() >= rates["vLLM"] * 0.99


def test_a_shared_prefix_helps_whoever_shares_it(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of("shared_prefix", "systems=[orca-oracle,paged]", *SHORT)
    one, five = crossings(summary, "fig16a"), crossings(summary, "fig16b")
    assert one["Orca(Oracle)"] < one["vLLM"]
    assert five["vLLM"] / five["Orca(Oracle)"] > 1.3 * one["vLLM"] / one["Orca(Oracle)"]
    assert set(summary[summary.paper == "pagedattention"].panel) == {"1-shot 80 tok", "5-shot 341 tok"}


def test_a_chatbot_as_the_artifact_and_fair(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of("chatbot", "systems=[orca-oracle,paged]", "arrival.duration_s=300", *SHORT[1:])
    theirs, fair = crossings(summary, "fig17"), crossings(summary, "chatbot")
    assert theirs["Orca(Oracle)"] < theirs["vLLM"] == fair["vLLM"], "one replay serves both"
    assert set(summary.panel) == {"chatbot", "chatbot, fair"}


def test_savings_grow_with_n_and_beams_save_more(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of(
        "sharing_savings", "arrival.duration_s=20", "arrival.rate=10", "params.window_s=[5,20]", "params.n=[2,6]",
        "systems=[paged,vattention-2mb]",
    )  # fmt: skip
    saving = summary[summary.quantity == "memory_saving_vs_n"].set_index(["panel", "system", "x"]).value
    assert 0 < saving["parallel", "vLLM", 2] < saving["parallel", "vLLM", 6]
    for n in (2, 6):
        assert saving["parallel", "vLLM", n] < saving["beam", "vLLM", n]
        assert saving["beam, survival all", "vLLM", n] < saving["beam", "vLLM", n]
        assert saving["beam", "vLLM", n] < saving["beam, survival one", "vLLM", n]
        blocks, page_groups = (saving["parallel", s, n] for s in ("vLLM", "vattention-2MB/vllm2023"))
        assert page_groups < blocks, "205 tokens of a page-group are more than most prompts"


def test_the_papers_saving_is_a_ratio_of_means_upside_down() -> None:
    """Two iterations that hold 10 and share 10, six that hold 30 and share nothing; two of a free pool."""
    rows = [(2, 10, 10, 2), (6, 30, 0, 3), (2, 0, 0, 0)]  # iterations, held, shared, sequences
    steps = pd.DataFrame(
        [
            {**dict.fromkeys(Usage._fields, 0), "live": held * n, "free": 7 * n, "shared_bytes": shared * n, "steps": n,
             "decodes": sequences, "prefills": 0}
            for n, held, shared, sequences in rows
        ]
    )  # fmt: skip
    found = savings(steps)
    assert found["saving"] == pytest.approx(100 * (1 - 1 / ((2 * 2 + 6 * 1) / 8)))
    assert found["physical_gb"] == pytest.approx((2 * 10 + 6 * 30) / 8 / 1e9)
    assert found["logical_gb"] == pytest.approx((2 * 20 + 6 * 30) / 8 / 1e9)
    assert found["batched_sequences"] == pytest.approx((2 * 2 + 6 * 3) / 8)


@pytest.mark.parametrize(
    ("experiment", "override", "reason"),
    [
        ("chatbot", "params.new_conversation=null", "at least one run"),
        ("parallel_sampling", "params.panels={fig14a: {n: 0, guess: {others: 1}}}", "at least 1"),
        ("parallel_sampling", "params.panels={fig14a: {n: 2}}", r"params\.guess"),
        ("shared_prefix", "params.panels={a: {name: a, trace: alpaca, prefix_tokens: 80, guess: {others: 1}}}",
         "does not reach past its prefix"),
        ("parallel_sampling", "params.only=[fig99]", "no panel is called 'fig99'. There are: fig14"),
        ("beam_search", "params.only=[fig99]", "no panel is called 'fig99'. There are: fig14"),
        ("shared_prefix", "params.only=[fig99]", "no panel is called 'fig99'. There are: fig16a, fig16b"),
    ],
)  # fmt: skip
def test_refusals(finished: Callable, experiment: str, override: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        finished(experiment, override, "systems=[paged]")
