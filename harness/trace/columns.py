"""Raw columns of length records, and the one check that they all pass."""

from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kvarena.harness.trace.arrival import LONGEST_S
from kvarena.harness.trace.bad_records import BadRecords
from kvarena.harness.trace.recipes import NO_LIMIT
from kvarena.harness.trace.trace import Ints


@dataclass
class Columns:
    """Fields of the records that could be read, still as they stood: lists or arrays of one length."""

    numbers: Any  # [N] number of each record in its source, from 1
    prompt: Any
    output: Any
    arrival: Any = None
    arrival_is: str = "seconds"
    conversation: Any = None  # equal for the turns of one conversation
    hash_ids: Any = None  # lists of whole numbers


def check_columns(columns: Columns, bad: BadRecords) -> dict[str, Any]:
    """Lengths and times of the well-formed records; each malformed one goes to `bad` with its reason.

    Whether the records have times is for the well-formed ones to say: a malformed record with a time makes none of the
    others malformed. Returns record, prompt_tokens, output_tokens [n] int64, arrival_s [n] float64, conversation_id [n]
    (numbered as they come) and hash_ids where there are.
    """
    prompt, output = _number(columns.prompt), _number(columns.output)
    wrong = _wrong_length(prompt) | _wrong_length(output)
    arrival = None
    if columns.arrival is not None:
        arrival = _seconds(columns.arrival, columns.arrival_is, ~wrong)
        timed = (arrival >= 0) & (arrival < LONGEST_S)
        if (timed & ~wrong).any():
            wrong |= ~timed
        else:
            wrong |= ~np.asarray(pd.Series(columns.arrival, dtype=object).isna())
            arrival = None
    for i in np.flatnonzero(wrong):
        bad.add(int(columns.numbers[i]), _reason(columns, int(i), prompt[i], output[i]))
    kept = np.flatnonzero(~wrong)
    clean: dict[str, Any] = {
        "record": np.asarray(columns.numbers, np.int64)[kept],
        "prompt_tokens": prompt[kept].astype(np.int64),
        "output_tokens": output[kept].astype(np.int64),
    }
    if arrival is not None:
        clean["arrival_s"] = arrival[kept]
    if columns.conversation is not None:
        clean["conversation_id"] = pd.factorize(np.asarray(columns.conversation))[0][kept]
    if columns.hash_ids is not None:
        clean["hash_ids"] = _named([columns.hash_ids[i] for i in kept])
    return clean


def _named(ids: list[list[int]]) -> list[Ints]:
    """The ids as int64, of which only the equality counts: numbered as they come where one of them is beyond it."""
    flat = list(chain.from_iterable(ids))
    try:
        names = np.array(flat, np.int64)
    except OverflowError:
        names = pd.factorize(np.array(flat, object))[0].astype(np.int64)
    ends = np.cumsum([len(each) for each in ids])
    return [names[end - len(each) : end] for each, end in zip(ids, ends, strict=True)]


def _number(values: Any) -> NDArray[np.float64]:
    """Numbers, NaN where there is none; counts of tokens are far below 2**53, so that float64 states them exactly."""
    return np.asarray(pd.to_numeric(pd.Series(values), errors="coerce"), np.float64)


def _wrong_length(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    right: NDArray[np.bool_] = (values >= 1) & (values <= NO_LIMIT) & (values == np.floor(values))
    return ~right


def _seconds(values: Any, unit: str, counted: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Seconds since the trace began, NaN where a stamp cannot be read; dates count from the first of those counted."""
    if unit == "date":
        dates = pd.to_datetime(pd.Series(values), format="ISO8601", errors="coerce", utc=True)
        first = dates[counted].min()
        near = dates.where(dates.dt.year <= first.year + 1)  # a difference of centuries would not fit into 64 bits
        return np.asarray((near - first) / pd.Timedelta(seconds=1), np.float64)
    return _number(values) / (1000 if unit == "milliseconds" else 1)


def _reason(columns: Columns, i: int, prompt: float, output: float) -> str:
    for name, raw, value in (("prompt", columns.prompt[i], prompt), ("output", columns.output[i], output)):
        if _wrong_length(np.array([value]))[0]:
            return f"{name} length is {_fault(raw, value)}"
    assert columns.arrival is not None
    wanted = "a date" if columns.arrival_is == "date" else f"{columns.arrival_is} since the trace began"
    stamp = repr(columns.arrival[i]) if isinstance(columns.arrival[i], str) else columns.arrival[i]
    return f"arrival is {stamp}, not {wanted}, at most {LONGEST_S:.0f} s after it"


def _fault(raw: Any, value: float) -> str:
    if raw is None:
        return "empty"
    if np.isnan(value):
        return f"{raw!r}, not a number"
    if value < 1:
        return f"{value:.17g}, below 1"
    return f"{value:.17g}, beyond {NO_LIMIT}" if value > NO_LIMIT else f"{value:.17g}, not a whole number"
