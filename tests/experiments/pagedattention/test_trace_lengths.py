"""Fig 11: exact from the data, near from the tables, and refusals."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from kvarena.errors import UserError
from kvarena.experiments.command.compose import compose_run
from kvarena.harness.paths import PUBLISHED
from kvarena.harness.record.summary import PUBLISHED_KEY, read_published


def published() -> pd.DataFrame:
    table = read_published(PUBLISHED)
    return table[(table.paper == "pagedattention") & (table.figure == "fig11")]


def test_the_data_gives_the_figure(summary_of: Callable[..., pd.DataFrame], shared: Callable) -> None:
    sharegpt, alpaca = shared("data/sharegpt_lengths.csv"), shared("data/alpaca_lengths.csv")
    summary = summary_of("trace_lengths", f"trace.path={sharegpt}", f"params.paths.alpaca={alpaca}")
    rows = published().merge(summary, on=PUBLISHED_KEY, how="left", suffixes=("_published", ""))
    assert rows.value.notna().all(), "every published point has its counterpart"
    means = rows.quantity == "mean_length"
    assert (rows.value - rows.value_published).abs()[means].max() < 0.005
    assert (rows.value - rows.value_published).abs()[~means].max() <= 1
    assert set(summary.evidence) == {"exact"}


def test_the_tables_come_near(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of("trace_lengths")
    rows = published().merge(summary, on=PUBLISHED_KEY, suffixes=("_published", ""))
    means = rows[rows.quantity == "mean_length"]
    assert len(means) == 4
    assert (means.value / means.value_published - 1).abs().max() < 0.02
    assert set(summary.model) == {"-"}, "no model is read"
    counts = summary[summary.quantity == "histogram_count_vs_bin_left"].groupby(["panel", "system"]).value
    names = {"sharegpt": "ShareGPT", "alpaca": "Alpaca"}
    records = summary[summary.quantity == "num_records"].replace({"panel": names})
    records = records.set_index(["panel", "system"]).value
    assert (counts.count() == 128).all()
    assert (counts.sum() - records).max() <= 0
    assert set(summary.evidence) == {"calibrated"}


@pytest.mark.parametrize("override", ["params.traces=[]", "params.num_bins=0", "params.bins.sharegpt.prompt=[5,5]"])
def test_what_makes_no_histogram_is_refused(finished: Callable, override: str) -> None:
    with pytest.raises(UserError, match="params"):
        finished("trace_lengths", override)


def test_a_file_of_ones_own_is_not_fig_11(summary_of: Callable[..., pd.DataFrame], tmp_path: Path) -> None:
    own = tmp_path / "own.csv"
    own.write_text("prompt_tokens,output_tokens\n" + "".join(f"{100 + i},{20 + i}\n" for i in range(50)))
    summary = summary_of("trace_lengths", f"trace.path={own}", "params.traces=[sharegpt]", "params.num_bins=49")
    assert set(summary.paper) == {"kvarena"}
    assert set(summary.panel) == {"own.csv"}
    assert set(summary.evidence) == {"exact"}
    counts = summary[summary.quantity == "histogram_count_vs_bin_left"].groupby("system")
    assert (counts.value.sum() == 50).all(), "its own range"
    assert counts.x.min().to_dict() == {"input": 100, "output": 20}


@pytest.mark.parametrize(
    "override",
    ["trace.num_requests=1000", "trace.seed=1", "trace.filter=none", "params.num_bins=64", "trace.max_tokens=500"],
)
def test_other_lengths_or_bins_are_not_fig_11(summary_of: Callable[..., pd.DataFrame], override: str) -> None:
    summary = summary_of("trace_lengths", "params.traces=[sharegpt]", override)
    assert set(summary.paper) == {"kvarena"}


@pytest.mark.parametrize(
    "override",
    ["model=opt-13b", "arrival.rate=2", "engine=lean", "device=h100", "systems=[paged]", "clock=measured",
     "params.traces=[alpaca] params.bins.sharegpt.prompt=[1,2]"],
)  # fmt: skip
def test_what_has_nothing_to_do_with_lengths_is_refused(override: str) -> None:
    with pytest.raises(UserError):
        compose_run("experiment=trace_lengths", *override.split())
