"""Medians and their intervals."""

import math

import numpy as np
import pytest
from scipy import stats

from kvarena.harness.record.statistics import median_interval


def test_six_samples_are_the_fewest_that_reach_95_percent() -> None:
    assert math.isnan(median_interval(range(5)).ci_low)
    six = median_interval([3, 1, 2, 60, 5, 4])
    assert (six.median, six.n, six.ci_low, six.ci_high) == (3.5, 6, 1, 60)


def test_an_estimate_is_shown_with_its_interval() -> None:
    assert f"{median_interval([3, 1, 2, 6, 5, 4]):.2f}" == "3.50 [1.00, 6.00]"


@pytest.mark.parametrize("n", [6, 9, 10, 17, 40, 101])
def test_the_interval_is_the_tightest_that_covers(n: int) -> None:
    estimate = median_interval(np.arange(1, n + 1))
    k = int(estimate.ci_low)  # the k-th smallest of 1..n is k
    assert estimate.ci_high == n + 1 - k
    assert 1 - 2 * stats.binom.cdf(k - 1, n, 0.5) >= 0.95
    assert 1 - 2 * stats.binom.cdf(k, n, 0.5) < 0.95


def test_it_covers_the_true_median_of_a_skewed_distribution() -> None:
    rng = np.random.default_rng(0)
    covered = [
        e.ci_low <= math.log(2) <= e.ci_high for e in (median_interval(rng.exponential(size=12)) for _ in range(1000))
    ]
    assert np.mean(covered) >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / 1000)


def test_nothing_measured_is_not_a_number() -> None:
    assert math.isnan(median_interval([]).median)
