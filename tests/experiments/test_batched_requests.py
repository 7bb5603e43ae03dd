"""Fig 13: the order of systems on a short trace, the published means on the paper's own, and refusals."""

from collections.abc import Callable

import pandas as pd
import pytest

from kvarena.errors import UserError
from kvarena.harness.paths import PUBLISHED
from kvarena.harness.summary import beside_published, read_published

MEAN = "mean_batched_requests"
LOAD = "figure: fig13a, trace: sharegpt, rate: 4.0, duration_s: 60"
SHORT = (
    f"params.loads=[{{{LOAD}, window: with_drain, window_s: [20, 200]}},"
    f"{{{LOAD}, window: without_drain, window_s: [20, 60]}}]"
)


def test_both_windows_have_their_names(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of("batched_requests", SHORT, "systems=[orca-max,orca-oracle,paged]")
    assert set(summary.panel) == {"OPT-13B ShareGPT 4 req/s"}
    with_drain = summary[summary.quantity == MEAN].set_index("system").value
    without = summary[summary.quantity == f"{MEAN}:without_drain"].set_index("system").value
    for batches in (with_drain, without):
        assert batches["Orca(Max)"] < batches["Orca(Oracle)"] < batches["vLLM"]
    assert without["Orca(Max)"] == pytest.approx(7, abs=0.01)
    assert without["vLLM"] > with_drain["vLLM"], "a drain has fewer and fewer requests"
    assert set(summary[summary.quantity == MEAN].figure) == {"fig13a"}
    assert set(summary[summary.quantity.str.contains(":")].paper) == {"kvarena"}


def test_published_means_within_five_percent(summary_of: Callable[..., pd.DataFrame], shared: Callable) -> None:
    load = "{figure: fig13a, window: with_drain, trace: sharegpt, rate: 2.0, duration_s: 900, window_s: [600, 3600]}"
    lengths = shared("data/sharegpt_lengths.csv")
    summary = summary_of(
        "batched_requests", f"params.loads=[{load}]", f"trace.path={lengths}",
        "systems=[orca-max,orca-pow2,orca-oracle,paged]",
    )  # fmt: skip
    rows = beside_published(summary, read_published(PUBLISHED)).dropna(subset=["published"])
    assert set(rows.system) == {"Orca(Max)", "Orca(Pow2)", "Orca(Oracle)", "vLLM"}
    assert (rows.value / rows.published - 1).abs().max() < 0.05


def test_a_rate_of_the_command_line_takes_another_panel(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of("batched_requests", SHORT, "arrival.rate=3", "systems=[orca-max]")
    assert set(summary.panel) == {"OPT-13B ShareGPT 3 req/s"}


@pytest.mark.parametrize(
    ("loads", "reason"),
    [
        ("[]", "at least one load"),
        ("[{figure: a, window: b, trace: sharegpt, rate: 1, duration_s: 9},"
         "{figure: a, window: b, trace: alpaca, rate: 1, duration_s: 9}]", "twice"),
        ("[{figure: a, window: b, trace: nosuch, rate: 1, duration_s: 9}]", "no such trace"),
        ("[{figure: a, window: b, trace: sharegpt, rate: 0, duration_s: 9}]", r"arrival\.rate"),
    ],
)  # fmt: skip
def test_bad_loads_are_refused(finished: Callable, loads: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        finished("batched_requests", f"params.loads={loads}")
