"""Averages over a hand-made replay: what each of the three means, and which window it is taken over."""

import pandas as pd
import pytest

from kvarena.allocators.usage import Usage
from kvarena.errors import UserError
from kvarena.harness.engine.step_log import COLUMNS
from kvarena.harness.record.time_averages import PS, Average, averages, by_interval, shares, usage_of, window


def steps_of(*rows: dict[str, int]) -> pd.DataFrame:
    """Rows of a step log; bytes are sums over the steps of the row, and the pool has 100."""
    table = pd.DataFrame([{**dict.fromkeys(COLUMNS, 0), "steps": 1, "duration_ps": PS, **row} for row in rows])
    table["free"] = 100 * table.steps - table.live
    return table.assign(system="a")


REPLAY = steps_of(
    {"start_ps": 0, "requests": 1, "prefills": 1, "live": 10},  # the only one in line is admitted
    {"start_ps": PS, "requests": 2, "decodes": 8, "steps": 3, "duration_ps": 9 * PS, "live": 240, "waiting": 4},
    {"start_ps": 10 * PS, "requests": 1, "decodes": 4, "preempted": 4, "live": 50, "waiting": 1},  # preempted, it waits
    {"start_ps": 11 * PS, "requests": 1, "decodes": 4, "live": 30},
)


def test_three_averages_of_one_window():
    means = averages(REPLAY).set_index("average")
    assert means.live[Average.OVER_ITERATIONS] == pytest.approx((10 + 240 + 50 + 30) / 6)
    assert means.live[Average.OVER_TIME] == pytest.approx((10 * 1 + 80 * 9 + 50 + 30) / 12)
    assert means.live[Average.WHILE_WAITING] == pytest.approx((240 + 50) / 4)
    assert means.batch[Average.OVER_ITERATIONS] == pytest.approx((1 + 2 * 3 + 1 + 1) / 6)
    assert list(means.num_steps) == [6, 6, 4]
    assert list(means.seconds) == [12, 12, 10]
    assert usage_of(means.loc[Average.OVER_TIME]).pool == 100


def test_nobody_waits():
    means = averages(REPLAY.iloc[[0, 3]]).set_index("average")
    assert means.num_steps[Average.WHILE_WAITING] == 0
    assert pd.isna(means.live[Average.WHILE_WAITING])


def test_a_window_takes_rows_that_start_in_it():
    assert list(window(REPLAY, [1, 10]).start_ps // PS) == [1, 10]
    assert list(window(REPLAY, None).start_ps // PS) == [1, 10]  # those that leave someone waiting
    assert len(window(REPLAY.iloc[[0, 3]], None)) == 2  # nobody ever waits: all of it


@pytest.mark.parametrize(
    ("bounds", "reason"), [([20, 30], "no step begins"), ([5, 5], "two times"), ([1], "two times")]
)
def test_a_window_without_steps_is_refused(bounds, reason):
    with pytest.raises(UserError, match=reason):
        window(REPLAY, bounds)


def test_intervals_keep_sums_and_means():
    table = by_interval(REPLAY, 10.0)
    assert list(table.start_s) == [0, 10]
    assert list(table.num_steps) == [4, 2]
    assert list(table.batch) == pytest.approx([(1 + 2 * 3) / 4, 1])
    assert table.live[0] == pytest.approx(250 / 4)
    assert table.preempted.sum() == 4
    assert set(Usage._fields) < set(table.columns)


def test_shares_sum_to_a_hundred():
    assert shares({"a": 1, "b": 3}) == {"a": 25.0, "b": 75.0}
