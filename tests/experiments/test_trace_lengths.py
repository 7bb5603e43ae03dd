"""Fig 11: exact from the data, near from the tables, and refusals."""

from collections.abc import Callable

import pandas as pd
import pytest

from kvarena.errors import UserError
from kvarena.harness.paths import PUBLISHED
from kvarena.harness.summary import PUBLISHED_KEY, read_published


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
    counts = summary[summary.quantity == "histogram_count_vs_bin_left"].groupby(["panel", "system"]).value
    records = summary[summary.quantity == "num_records"].set_index(["panel", "system"]).value
    assert (counts.count() == 128).all()
    assert (counts.sum() - records).max() <= 0
    assert set(summary.evidence) == {"calibrated"}


@pytest.mark.parametrize("override", ["params.traces=[]", "params.num_bins=0", "params.bins.sharegpt.prompt=[5,5]"])
def test_what_makes_no_histogram_is_refused(finished: Callable, override: str) -> None:
    with pytest.raises(UserError, match="params"):
        finished("trace_lengths", override)
