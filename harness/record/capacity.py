"""Capacity: the highest rate whose latency stays within a limit, by bisection, with seeds paired across systems.

latency |          x   two rates that were tried bracket the limit; the rate at the limit lies on the straight line
 limit -+- - - - -/    between them, both axes logarithmic (`crossing`)
        |      x.'
        +----------- rate
"""

from collections.abc import Callable
from math import exp, log
from typing import NamedTuple

import pandas as pd

from kvarena.errors import UserError
from kvarena.harness.record.statistics import Estimate, median_interval

LatencyAt = Callable[[float], float]  # rate in requests/s -> latency


class Capacity(NamedTuple):
    """The limit lies between two rates that were tried: `rate` keeps it, `above` does not."""

    rate: float
    above: float


def capacity(
    latency_at: LatencyAt, limit: float, guess: float, tolerance: float = 0.01, stride: float = 2.0
) -> Capacity:
    """Bracket the highest rate that keeps `limit`, to a ratio of 1 + tolerance.

    Starts at `guess` and multiplies or divides by `stride`, which is less than 2 for a good guess, until the limit
    lies between two rates. Near the knee, latency over one trace need not rise with every small step in rate; the
    bracket is one crossing. Raises UserError for arguments out of range, and where no rate within a factor of 1024 of
    the guess crosses the limit.
    """
    if not (guess > 0 and limit > 0 and tolerance > 0 and stride > 1):
        raise UserError(
            f"capacity: guess {guess}, limit {limit} and tolerance {tolerance} must be above 0, stride {stride} above 1"
        )
    low = high = guess
    if latency_at(guess) <= limit:
        while latency_at(high := stride * high) <= limit:
            low = _within_reach(high, guess, limit, "keeps")
    else:
        while latency_at(low := low / stride) > limit:
            high = _within_reach(low, guess, limit, "breaks")
    return _bisect(latency_at, limit, low, high, tolerance)


def _within_reach(rate: float, guess: float, limit: float, verdict: str) -> float:
    if not guess / 1024 < rate < guess * 1024:
        raise UserError(f"capacity: every rate tried from {guess:g} to {rate:g}/s {verdict} the limit of {limit:g}")
    return rate


def _bisect(latency_at: LatencyAt, limit: float, low: float, high: float, tolerance: float) -> Capacity:
    while high > low * (1 + tolerance):
        middle = (low * high) ** 0.5
        if latency_at(middle) <= limit:
            low = middle
        else:
            high = middle
    return Capacity(low, high)


def crossing(low: tuple[float, float], high: tuple[float, float], limit: float) -> float:
    """The rate at `limit` between two points (rate, latency), of which `low` keeps it and `high` does not.

    rate = low (high / low)^w,   w = ln(limit / latency at low) / ln(latency at high / latency at low)
    """
    (rate, below), (above, beyond) = low, high
    share = log(limit / below) / log(beyond / below)
    return rate * exp(log(above / rate) * share)


def paired_ratio(rates: pd.DataFrame, system: str, baseline: str) -> Estimate:
    """Median and 95 % interval of system / baseline over seeds; `rates` has a row per seed, a column per system.

    The same seed gives both the same requests and arrivals, so that what the traces share cancels. Raises UserError
    for a system that is not there.
    """
    for name in (system, baseline):
        if name not in rates.columns:
            raise UserError(f"capacity: no system is called {name!r}. There are: {', '.join(rates.columns)}")
    return median_interval(rates[system] / rates[baseline])
