"""Summaries of runs that differ in their seeds alone, as one summary."""

from collections.abc import Sequence

import pandas as pd

from kvarena.harness.record.statistics import median_interval
from kvarena.harness.record.summary import COLUMNS, KEY
from kvarena.harness.run.published import OURS

_RAN = ["setup", "label", "allocator", "kernel", "model", "quantity", "x", "unit", "clock", "device"]
_NAMES = ["paper", "figure", "panel", "system"]


def over_seeds(summaries: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Summaries of runs that differ in seeds alone as one: a row of all seeds for each number, its median and interval.

    A row that one seed alone earned a published name for stays beside it, as it is.
    """
    if len(summaries) == 1:
        return summaries[0]
    rows = pd.concat([table.assign(seed=seed) for seed, table in enumerate(summaries)], ignore_index=True)
    ours_last = rows.assign(own=rows.paper == OURS).sort_values("own", kind="stable")
    each = ours_last.drop_duplicates(["seed", *_RAN], keep="last").sort_index()
    earned = rows[rows.paper != OURS]
    folded = [_folded(alike) for _, alike in each.groupby(_RAN, sort=False, dropna=False)]
    folded += [_folded(alike) for _, alike in earned.groupby(KEY, sort=False, dropna=False)]
    return pd.DataFrame(folded)[COLUMNS].drop_duplicates(KEY, ignore_index=True)


def _folded(rows: pd.DataFrame) -> dict[str, object]:
    """One row of those of every seed, ours unless all have one published name."""
    earned_first = rows.sort_values("paper", key=lambda paper: paper != OURS, kind="stable")
    first = {str(name): value for name, value in earned_first.iloc[0].items()}
    if len(rows) == 1:
        return first
    if len(rows[_NAMES].drop_duplicates()) > 1:
        first |= {"paper": OURS, "figure": first["experiment"], "panel": first["setup"], "system": first["label"]}
    estimate = median_interval(rows.value)
    return {**first, "value": estimate.median, "n": estimate.n, "ci_low": estimate.ci_low, "ci_high": estimate.ci_high}
