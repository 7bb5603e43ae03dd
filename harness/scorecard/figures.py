"""A kept run beside the published figures: every point that both have, how far apart they are, and the verdict.

The rule is one for all figures. Shares in percent differ by points, everything else by ratio, taken as a logarithm so
that half and double are equally wrong. Holds: the root mean square of the differences is at most 10 % (3 points). Of a
histogram, whose bins may be empty, what counts is the share of all records that lie in other bins: at most 10 % too.
Holds in direction: of all pairs of points that the paper separates by more than 5 %, at least 90 % lie the same way
round here. Calibrated points count like the others, and the page says how many there are.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from kvarena.harness.record.summary import beside_published
from kvarena.harness.scorecard.judge import Verdict
from kvarena.harness.scorecard.kept_runs import KeptRun

HOLDS_PERCENT, HOLDS_POINTS = 10.0, 3.0
APART, ALIKE = 0.05, 0.90
COUNTED = "records"  # unit of a histogram's bins
RULE = (
    f"holds: RMS error at most {HOLDS_PERCENT:g} % ({HOLDS_POINTS:g} points for shares; {HOLDS_PERCENT:g} % of the "
    "records of a histogram in other bins); direction: at least "
    f"{100 * ALIKE:g} % of the pairs of points that the paper separates by more than {100 * APART:g} % lie the same "
    "way round"
)


@dataclass(frozen=True)
class Compared:
    """One quantity of one published figure, as one run has it."""

    run: KeptRun
    paper: str
    figure: str
    quantity: str  # with kinds, `quantity:kind`, taken together
    unit: str
    points: pd.DataFrame  # panel, system, quantity, x, value, published, clock, device, evidence
    error: float  # RMS, in percent or points; of a histogram the percentage of records in other bins
    alike: float  # share of pairs that lie the same way round; NaN where the paper separates none

    @property
    def in_points(self) -> bool:
        """Whether the differences are percentage points."""
        return self.unit == "%"

    @property
    def verdict(self) -> Verdict:
        """By the rule above."""
        if self.error <= (HOLDS_POINTS if self.in_points else HOLDS_PERCENT):
            return Verdict.HOLDS
        return Verdict.DIRECTION if self.alike >= ALIKE else Verdict.FAILS

    @property
    def deviation(self) -> str:
        """The error, with its unit."""
        return f"{self.error:.3g} {'points' if self.in_points else '%'}"


def compare(run: KeptRun, published: pd.DataFrame) -> list[Compared]:
    """What the run and the papers both have, by figure and quantity, in the order of the run's rows."""
    rows = beside_published(run.summary, published).dropna(subset=["published", "value"])
    rows = rows.assign(kind=rows["quantity"].str.split(":").str[0])
    return [
        _compared(run, str(paper), str(figure), str(quantity), str(unit), points)
        for (paper, figure, quantity, unit), points in rows.groupby(["paper", "figure", "kind", "unit"], sort=False)
    ]


def _compared(run: KeptRun, paper: str, figure: str, quantity: str, unit: str, points: pd.DataFrame) -> Compared:
    error = _misplaced(points) if unit == COUNTED else _rms(points, in_points=unit == "%")
    return Compared(run, paper, figure, quantity, unit, points, error, _alike(points))


def _misplaced(points: pd.DataFrame) -> float:
    """Percentage of a histogram's records that lie in other bins than the paper's."""
    return 50 * float((points["value"] - points["published"]).abs().sum() / points["published"].sum())


def _rms(points: pd.DataFrame, in_points: bool) -> float:
    """Root mean square error in percentage points, or in percent by logarithm; a sign or a zero missed is infinite."""
    ours, theirs = points["value"].to_numpy(float), points["published"].to_numpy(float)
    if in_points:
        return float(np.sqrt(np.mean((ours - theirs) ** 2)))
    both_zero = (ours == 0) & (theirs == 0)
    comparable = ours * theirs > 0
    if not np.all(both_zero | comparable):
        return float("inf")
    logs = np.log(ours[comparable] / theirs[comparable])
    return 100 * float(np.expm1(np.sqrt(np.sum(logs**2) / len(points))))


def _alike(points: pd.DataFrame) -> float:
    """Over pairs of points of one panel and quantity: the share that lies the same way round."""
    same = pairs = 0
    for _, rows in points.groupby(["panel", "quantity"], sort=False):
        ours, theirs = rows["value"].to_numpy(float), rows["published"].to_numpy(float)
        gaps = theirs[:, None] - theirs[None, :]
        apart = gaps > APART * np.maximum(np.abs(theirs[:, None]), np.abs(theirs[None, :]))
        pairs += int(apart.sum())
        same += int((apart & (ours[:, None] > ours[None, :])).sum())
    return same / pairs if pairs else float("nan")


def not_run(compared: Iterable[Compared], published: pd.DataFrame) -> list[tuple[str, str]]:
    """Published (paper, figure) that no kept run has a point of."""
    there = {(c.paper, c.figure) for c in compared}
    pairs = published[["paper", "figure"]].drop_duplicates().itertuples(index=False, name=None)
    return [(str(paper), str(figure)) for paper, figure in pairs if (paper, figure) not in there]
