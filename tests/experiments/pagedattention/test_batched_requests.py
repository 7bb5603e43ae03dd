"""Fig 13: the order of systems on a short trace, the published means on the paper's own, and refusals."""

from collections.abc import Callable

import pandas as pd
import pytest

from kvarena.errors import UserError
from kvarena.experiments.command.compose import compose_run
from kvarena.harness.paths import PUBLISHED
from kvarena.harness.record.summary import beside_published, read_published

MEAN = "mean_batched_requests"
LOAD = "figure: fig13a, trace: sharegpt, rate: 4.0, duration_s: 60"
SHORT = (
    f"params.loads=[{{{LOAD}, window: with_drain, window_s: [20, 200]}},"
    f"{{{LOAD}, window: without_drain, window_s: [20, 60]}}]"
)
DRAWN = "figure: fig13a, window: with_drain, trace: sharegpt, rate: 2.0, duration_s: 900, window_s: [600, 3600]"


def test_both_windows_have_their_names(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of("batched_requests", SHORT, "systems=[orca-max,orca-oracle,paged]", "params.seeds=[0]")
    assert set(summary.panel) == {"opt-13b sharegpt, 4 req/s, 1 x a100-40gb"}, "another load is not Fig 13"
    with_drain = summary[summary.quantity == MEAN].set_index("allocator").value
    without = summary[summary.quantity == f"{MEAN}:without_drain"].set_index("allocator").value
    for batches in (with_drain, without):
        assert batches["orca_max"] < batches["orca_oracle"] < batches["paged"]
    assert without["orca_max"] == pytest.approx(7, abs=0.01)
    assert without["paged"] > with_drain["paged"], "a drain has fewer and fewer requests"
    assert set(summary.paper) == {"kvarena"}


def test_the_papers_bar_is_seed_0s_and_ours_are_over_all(summary_of: Callable[..., pd.DataFrame]) -> None:
    loads, systems = f"params.loads=[{{{DRAWN}}}]", "systems=[orca-max,paged,vattention-2mb]"
    summary = summary_of("batched_requests", loads, systems, "params.seeds=[0,1,2,3,4,5]")
    rows = summary[summary.quantity == MEAN]
    theirs = rows[rows.paper == "pagedattention"].set_index("system")
    ours = rows[rows.paper == "kvarena"].set_index("allocator")
    assert theirs.n.to_dict() == {"Orca(Max)": 1, "vLLM": 1}, "vAttention is not in Fig 13"
    assert set(theirs.panel) == {"OPT-13B ShareGPT 2 req/s"}
    assert set(theirs.evidence) == {"predicted"}
    assert set(ours.n) == {6}
    assert (ours.ci_low <= ours.value).all()
    assert ours.ci_low["paged"] <= theirs.value["vLLM"] <= ours.ci_high["paged"]
    alone = summary_of("batched_requests", loads, "systems=[paged]", "params.seeds=[0]")
    alone = alone[(alone.quantity == MEAN) & (alone.paper == "pagedattention")]
    assert alone.value.item() == theirs.value["vLLM"]


def names(*overrides: str) -> list[tuple[str, str]]:
    """Figure and panel of what paged's compared rows earn."""
    run = compose_run("experiment=batched_requests", "clock=modelled", "systems=[paged]", *overrides)
    found = [load.names(run, run.systems[0], published=True) for load in run.params.loads]
    return [(each["figure"], each["panel"]) for each in found if each["paper"] == "pagedattention"]


def test_by_default_both_panels_are_the_papers() -> None:
    assert names() == [("fig13a", "OPT-13B ShareGPT 2 req/s"), ("fig13b", "OPT-13B Alpaca 30 req/s")]


@pytest.mark.parametrize(
    "override",
    [
        "arrival.rate=1.5",
        "engine=lean",
        "model.max_tokens=1024",
        "params.pool_bytes=1000000000",
        "trace.max_tokens=1024",
        "arrival.quantum_s=0.02",
        f"params.loads=[{{{DRAWN.replace('600, 3600', '600, 900')}}}]",
        f"params.loads=[{{{DRAWN.replace('duration_s: 900', 'duration_s: 600')}}}]",
    ],
)
def test_another_run_is_not_the_papers(override: str) -> None:
    assert names(*(["model=opt-13b"] if "model." in override else []), override) == []


@pytest.mark.parametrize(("source", "within"), [("table", 0.1), ("file", 0.05)])
def test_means_are_near_the_published(
    summary_of: Callable[..., pd.DataFrame], shared: Callable, source: str, within: float
) -> None:
    lengths = [f"trace.path={shared('data/sharegpt_lengths.csv')}"] if source == "file" else []
    summary = summary_of(
        "batched_requests", f"params.loads=[{{{DRAWN}}}]", *lengths, "params.seeds=[0]",
        "systems=[orca-max,orca-pow2,orca-oracle,paged]",
    )  # fmt: skip
    rows = beside_published(summary, read_published(PUBLISHED)).dropna(subset=["published"])
    assert set(rows.system) == {"Orca(Max)", "Orca(Pow2)", "Orca(Oracle)", "vLLM"}
    assert (rows.value / rows.published - 1).abs().max() < within


def test_a_rate_of_the_command_line_takes_another_panel(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of("batched_requests", SHORT, "arrival.rate=3", "systems=[orca-max]", "params.seeds=[0]")
    assert set(summary.panel) == {"opt-13b sharegpt, 3 req/s, 1 x a100-40gb"}


@pytest.mark.parametrize(
    ("loads", "reason"),
    [
        ("[]", "at least one load"),
        ("[{figure: a, window: b, trace: sharegpt, rate: 1, duration_s: 9},"
         "{figure: a, window: b, trace: alpaca, rate: 1, duration_s: 9}]", "twice"),
        ("[{figure: a, window: b, trace: alpaca, rate: 1, duration_s: 9},"
         "{figure: b, window: b, trace: alpaca, rate: 1, duration_s: 8}]", "a trace at one rate"),
        ("[{figure: a, window: b, trace: nosuch, rate: 1, duration_s: 9}]", "no such trace"),
        ("[{figure: a, window: b, trace: sharegpt, rate: 0, duration_s: 9}]", r"loads\.rate"),
    ],
)  # fmt: skip
def test_bad_loads_are_refused(finished: Callable, loads: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        finished("batched_requests", f"params.loads={loads}")
