"""Whether the head is slower than the base, from samples that were taken in turns.

True means both: the head's samples rank above the base's further than chance does once in 500 times (one-sided exact
Mann-Whitney), and its median is more than 10 % above. False means that the samples do not show it, which is no proof
of equal speed: a real slowdown below 10 % is always False.
"""

import math
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from scipy import stats

MAX_P = 0.002  # one-sided; two samples of 8 can reach 0.00008, two of 5 only 0.004
MAX_RATIO = 1.10  # of medians: smaller differences come and go with the layout of memory
MIN_SAMPLES = 8


class Comparison(NamedTuple):
    """Two sets of samples."""

    ratio: float  # of medians, head over base
    p: float  # probability of such ranks, or more lopsided ones, if both were drawn alike

    @property
    def slower(self) -> bool:
        """Whether the head is slower; the module says what that means."""
        return self.p < MAX_P and self.ratio > MAX_RATIO


def compare(base: Sequence[float], head: Sequence[float]) -> Comparison | None:
    """Compare samples; None where they cannot be judged: too few, not finite, or not above 0."""
    if min(len(base), len(head)) < MIN_SAMPLES:
        return None
    if not all(math.isfinite(sample) and sample > 0 for sample in (*base, *head)):
        return None
    p = stats.mannwhitneyu(head, base, alternative="greater", method="exact").pvalue
    return Comparison(median(head) / median(base), float(p))
