"""Averages over a window of a replay: the batch, and the pool's bytes by leaf.

Three of them, since each says something else (docs/metrics.md): over iterations, as the papers take them; over time;
and over the iterations that left a request waiting, because an idle server has free memory under any allocator.
"""

from collections.abc import Sequence
from enum import StrEnum

import pandas as pd

from kvarena.allocators.usage import LEAVES, Usage
from kvarena.errors import UserError

PS = 10**12  # picoseconds of a second


class Average(StrEnum):
    """What an average is taken over."""

    OVER_ITERATIONS = "over_iterations"
    OVER_TIME = "over_time"
    WHILE_WAITING = "while_waiting"


def leaves_someone_waiting(steps: pd.DataFrame) -> pd.Series:
    """Whether a request stays in line although the step has admitted whom it could.

    Preempted requests stand in line again. Where prompts are short of the token budget, memory is what they lack.
    """
    waiting: pd.Series = steps.waiting > 0
    return waiting


def check_window(bounds_s: Sequence[float] | None) -> None:
    """Raises UserError where [from, to] are no two times in order; to be called before anything is replayed."""
    if bounds_s is not None and (len(bounds_s) != 2 or not 0 <= bounds_s[0] < bounds_s[1]):
        raise UserError(f"params.window_s={list(bounds_s)}: takes two times in seconds, [from, to]")


def window(steps: pd.DataFrame, bounds_s: Sequence[float] | None) -> pd.DataFrame:
    """Rows that start within [from, to] seconds; None: those that leave someone waiting, all where none does.

    A stretch of steps counts where it starts. Raises UserError for a window without steps.
    """
    check_window(bounds_s)
    if bounds_s is None:
        waiting = steps[leaves_someone_waiting(steps)]
        rows = steps if waiting.empty else waiting
    else:
        start_s = steps.start_ps / PS
        rows = steps[(start_s >= bounds_s[0]) & (start_s <= bounds_s[1])]
    if rows.empty:
        ends = "" if steps.empty else f"; the last of {len(steps)} rows starts at {steps.start_ps.iloc[-1] / PS:.0f} s"
        raise UserError(f"params.window_s={list(bounds_s or [])}: no step begins there{ends}")
    return rows


def averages(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per kind of average: `average`, `num_steps`, `seconds`, `batch`, and bytes by leaf (and part of one).

    The batch counts requests: all sequences of one together.

    Rows are stretches of one or more steps. Where nobody ever waits, the third average has no steps and NaN.
    """
    waiting = leaves_someone_waiting(rows)
    values = rows[list(Usage._fields)].div(rows.steps, axis=0).assign(batch=rows.requests)
    weights = {
        Average.OVER_ITERATIONS: rows.steps.astype(float),
        Average.OVER_TIME: rows.duration_ps.astype(float),
        Average.WHILE_WAITING: rows.steps * waiting.astype(float),
    }
    table = []
    for average, weight in weights.items():
        counted = rows[weight > 0]
        means = values.mul(weight, axis=0).sum() / weight.sum() if len(counted) else values.iloc[0] * float("nan")
        num_steps, seconds = int(counted.steps.sum()), counted.duration_ps.sum() / PS
        table.append({"average": str(average), "num_steps": num_steps, "seconds": seconds, **means})
    return pd.DataFrame(table)


def usage_of(row: pd.Series) -> Usage:
    """The mean bytes of one row of `averages`, rounded to whole ones."""
    return Usage(*[round(row[name]) for name in Usage._fields])


def shares(parts: dict[str, int]) -> dict[str, float]:
    """Parts of a whole, in percent."""
    whole = sum(parts.values())
    return {name: 100 * part / whole for name, part in parts.items()}


def leaves(usage: Usage) -> dict[str, int]:
    """The nine leaves by name."""
    return dict(zip(LEAVES, usage.leaves, strict=True))


def by_interval(steps: pd.DataFrame, interval_s: float) -> pd.DataFrame:
    """Steps summed up by intervals of time, small enough to keep: means per step, and sums of what is counted.

    Columns: system, start_s, num_steps, seconds, batch, waiting, preempted, actions, ahead, and mean bytes by leaf.
    The batch, and who waits, are requests.
    """
    start_s = (steps.start_ps / PS // interval_s * interval_s).rename("start_s")
    sums = steps.assign(
        num_steps=steps.steps,
        seconds=steps.duration_ps / PS,
        batch=steps.requests * steps.steps,
        waiting=steps.waiting * steps.steps,
    ).groupby(["system", start_s], sort=False)[
        ["num_steps", "seconds", "preempted", "actions", "ahead", "batch", "waiting", *Usage._fields]
    ].sum()  # fmt: skip
    for name in ("batch", "waiting", *Usage._fields):
        sums[name] = sums[name] / sums.num_steps
    return sums.astype({name: "float32" for name in ("batch", "waiting")}).reset_index()
