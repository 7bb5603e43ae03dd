"""The search for a capacity, on latencies whose knee is known."""

import pandas as pd
import pytest

from kvarena.errors import UserError
from kvarena.harness.record.capacity import capacity, crossing, paired_ratio


@pytest.mark.parametrize("guess", [0.01, 1.9, 2.0, 2.1, 300])
def test_brackets_the_knee(guess):
    tried = []

    def latency_at(rate):
        tried.append(rate)
        return 0.03 if rate <= 1.93 else 5.0

    found = capacity(latency_at, limit=0.5, guess=guess, tolerance=0.01)
    assert found.rate <= 1.93 < found.above <= found.rate * 1.01
    assert {found.rate, found.above} <= set(tried), "both ends were tried, not guessed"


@pytest.mark.parametrize(("latency", "verdict"), [(0.1, "keeps"), (9.0, "breaks")])
def test_a_limit_that_nothing_crosses_is_refused(latency, verdict):
    with pytest.raises(UserError, match=f"every rate tried from 1 to .*{verdict} the limit of 0.5"):
        capacity(lambda rate: latency, limit=0.5, guess=1)


def test_a_crossing_is_where_a_power_law_through_both_points_meets_the_limit():
    def latency(rate):
        return 0.03 * rate**7

    at_limit = (0.5 / 0.03) ** (1 / 7)
    found = crossing((1.2, latency(1.2)), (1.7, latency(1.7)), 0.5)
    assert found == pytest.approx(at_limit)
    assert crossing((1.2, 0.5), (1.3, 0.9), 0.5) == 1.2, "a rate that meets the limit keeps it"


@pytest.mark.parametrize("wrong", [{"guess": 0}, {"limit": -1}, {"tolerance": 0}])
def test_senseless_arguments_are_refused(wrong):
    with pytest.raises(UserError, match="must be above 0"):
        capacity(lambda rate: rate, **({"limit": 1, "guess": 1} | wrong))


def test_pairing_cancels_what_the_traces_share():
    trace_luck = pd.Series([0.5, 0.8, 1.0, 1.3, 1.9, 2.4])
    rates = pd.DataFrame({"a": 1.75 * trace_luck, "b": trace_luck})
    ratio = paired_ratio(rates, "a", "b")
    assert (ratio.median, ratio.ci_low, ratio.ci_high) == pytest.approx((1.75, 1.75, 1.75))
    with pytest.raises(UserError, match=r"'c'.*a, b"):
        paired_ratio(rates, "a", "c")
