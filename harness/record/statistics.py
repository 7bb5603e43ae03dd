"""Medians with distribution-free 95 % intervals."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


class Estimate(NamedTuple):
    """A median, the number of samples behind it, and its 95 % interval (NaN where the samples cannot give one)."""

    median: float
    n: int
    ci_low: float
    ci_high: float

    def __format__(self, spec: str) -> str:
        """`median [low, high]`, each number as `spec` has it."""
        return f"{self.median:{spec}} [{self.ci_low:{spec}}, {self.ci_high:{spec}}]"


def median_interval(samples: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Median with the tightest symmetric pair of order statistics that covers it with `confidence`.

    The k-th smallest and k-th largest of n samples enclose the median with probability 1 - 2 P(Binomial(n, 1/2) < k),
    whatever the distribution. Fewer than 6 samples cannot reach 95 %: the interval is NaN then.
    """
    values = np.sort(np.asarray(samples, dtype=float))
    n = len(values)
    if n == 0:
        return Estimate(float("nan"), 0, float("nan"), float("nan"))
    k = int(stats.binom.ppf((1 - confidence) / 2, n, 0.5))  # samples to give up at either end
    while k > 0 and 1 - 2 * stats.binom.cdf(k - 1, n, 0.5) < confidence:
        k -= 1
    if k == 0:
        return Estimate(float(np.median(values)), n, float("nan"), float("nan"))
    return Estimate(float(np.median(values)), n, float(values[k - 1]), float(values[n - k]))
