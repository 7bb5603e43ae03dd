"""How far replayed points of PagedAttention's Fig 12 lie from the published ones."""

import numpy as np
import pandas as pd

from kvarena.experiments.kit.latency_curve import LATENCY
from kvarena.harness.record.summary import published_values


def log_errors(points: pd.DataFrame, figure: str) -> pd.Series:
    """log(ours / published) of every point that the paper has too; `points` has columns panel, system, x, value.

    Where the paper draws two points at one rate (vLLM at 1.5 in Fig 12a), the nearer counts.
    """
    theirs = published_values("pagedattention", figure=figure)
    theirs = theirs[theirs.quantity.str.startswith(LATENCY)]
    both = (
        points[["panel", "system", "x", "value"]]
        .reset_index()
        .merge(theirs, on=["panel", "system", "x"], suffixes=("", "_published"))
    )
    both["error"] = np.log(both.value / both.value_published)
    nearer = both.error.abs().groupby(both["index"]).idxmin()
    return both.loc[nearer].set_index("index").error


def rms(errors: pd.Series) -> float:
    """Root mean square, in percent: of logarithms, so that half and double are equally wrong."""
    return 100 * float((errors**2).mean() ** 0.5)
