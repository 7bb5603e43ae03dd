"""Raw columns of length records, and the one check that they all pass."""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from kvarena.errors import UserError
from kvarena.harness.trace.arrival import LONGEST_S
from kvarena.harness.trace.bad_records import BadRecords, Faults
from kvarena.harness.trace.config import TraceConfig
from kvarena.harness.trace.formats import DATE, LengthFormat, shown
from kvarena.harness.trace.recipes import NO_LIMIT
from kvarena.harness.trace.trace import Ints
from kvarena.harness.trace.turns import conversation_numbers, without_history
from kvarena.harness.trace.units import PER_SECOND, Floats, Mask, Units, units_of

_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}


@dataclass
class Columns:
    """Fields of the records that could be read, still as they stood: lists or arrays of one length."""

    numbers: Any  # [N] number of each record in its source, from 1
    prompt: Any
    output: Any
    form: LengthFormat | None = None  # None: of text, whose tokens were counted
    arrival: Any = None
    conversation: Any = None  # texts, equal for the turns of one conversation
    num_ids: Any = None  # numbers of ids of its blocks, NaN where a record has none: they tell the units
    hash_ids: Any = None  # these ids as they stood, where they are kept
    others: Collection[str] = ()  # fields that nothing is read of


class Checked(NamedTuple):
    """What the well-formed records state."""

    # record, prompt_tokens, output_tokens [n] int64; arrival_s [n] float64, conversation_id [n] int64 (numbered as they
    # come) and hash_ids where there are
    clean: dict[str, Any]
    facts: dict[str, Any]  # for the trace's provenance: units, fields that are not read, and requests that failed


def check_columns(columns: Columns, config: TraceConfig, bad: BadRecords) -> Checked:
    """What the well-formed records state; each malformed one goes to `bad` with its reason.

    Whether the records have times, and in which units, is for the well-formed ones to say: a malformed record with a
    time makes none of the others malformed. Raises UserError where a unit must be told.
    """
    prompt, output = _number(columns.prompt), _number(columns.output)
    faults = Faults(len(prompt))
    faults.add(_wrong_length(prompt), lambda i: f"prompt length is {_fault(columns.prompt[i], prompt[i])}")
    failed = faults.right & (output == 0) & (columns.form is not None and columns.form.zero_output_fails)
    faults.add(_wrong_length(output) & ~failed, lambda i: f"output length is {_fault(columns.output[i], output[i])}")
    units = _units(columns, config, prompt, faults.right & ~failed)
    found: dict[str, Any] = {"prompt_tokens": prompt, "output_tokens": output}
    if columns.arrival is not None:
        found["arrival_s"] = _arrivals(columns, units, failed, faults)
    if columns.hash_ids is not None:
        found["hash_ids"] = _ids(columns, units, prompt, failed, faults)
    if columns.conversation is not None:
        found["conversation_id"] = conversation_numbers(columns.conversation)
        _check_turns(found, failed, faults)
    faults.tell(columns.numbers, bad)
    kept = np.flatnonzero(faults.right & ~failed)
    clean: dict[str, Any] = {"record": np.asarray(columns.numbers, np.int64)[kept]}
    for name, values in found.items():
        if values is None:
            continue
        if name == "hash_ids":
            clean[name] = _named([values[i] for i in kept])
        else:
            clean[name] = values[kept] if name == "arrival_s" else values[kept].astype(np.int64)
    facts: dict[str, Any] = {"not_read": list(columns.others)} | ({} if units is None else units._asdict())
    return Checked(clean, facts | ({"failed": int(failed.sum())} if failed.any() else {}))


def _number(values: Any) -> Floats:
    """Numbers, NaN where there is none; counts of tokens are far below 2**53, so that float64 states them exactly."""
    return np.asarray(pd.to_numeric(pd.Series(values), errors="coerce"), np.float64)


def _wrong_length(values: Floats) -> Mask:
    right: Mask = (values >= 1) & (values <= NO_LIMIT) & (values == np.floor(values))
    return ~right


def _fault(raw: Any, value: float) -> str:
    if raw is None:
        return "empty"
    if np.isnan(value):
        return f"{raw!r}, not a number"
    if value < 1:
        return f"{value:.17g}, below 1"
    return f"{value:.17g}, beyond {NO_LIMIT}" if value > NO_LIMIT else f"{value:.17g}, not a whole number"


def _units(columns: Columns, config: TraceConfig, prompt: Floats, counted: Mask) -> Units | None:
    """Units by the records that are counted; None for text."""
    if columns.form is None:
        _check_used(config, False, False)
        return None
    nothing = np.full(len(prompt), np.nan)
    is_number = columns.arrival is not None and (columns.form.time_unit != DATE or config.time_unit is not None)
    stamps = _number(columns.arrival) if is_number else nothing
    num_ids = nothing if columns.num_ids is None else np.asarray(columns.num_ids, np.float64)
    _check_used(config, columns.arrival is not None, columns.conversation is not None or bool((num_ids > 0).any()))
    return units_of(config, columns.form, stamps[counted], prompt[counted], num_ids[counted])


def _check_used(config: TraceConfig, has_times: bool, has_blocks: bool) -> None:
    """Raises UserError for a unit of what the source does not state."""
    if config.time_unit is not None and not has_times:
        raise UserError(f"trace.time_unit={config.time_unit}: {config.path} records no times")
    if config.block_tokens is not None and not has_blocks:
        raise UserError(
            f"trace.block_tokens={config.block_tokens}: {config.path} says nothing of what prompts share: neither "
            "hash_ids nor conversation_id"
        )


def _arrivals(columns: Columns, units: Units | None, failed: Mask, faults: Faults) -> Floats | None:
    """Seconds since the trace began, [N]; None where no well-formed record has a time, which no other then may have."""
    assert columns.form is not None
    assert units is not None, "text has no times"
    counted = faults.right & ~failed
    arrival = _seconds(columns.arrival, units.time_unit, counted, columns.form.from_first)
    timed = (arrival >= 0) & (arrival < LONGEST_S)
    has_times = bool((timed & counted).any())
    wanted = "a date (2023-11-16 18:17:03)" if units.time_unit == DATE else f"{_NAMES[units.time_unit]} since it began"

    def reason(i: int) -> str:
        stamp = repr(columns.arrival[i]) if isinstance(columns.arrival[i], str) else columns.arrival[i]
        said = f"arrival is {stamp}, not {wanted}, at most {LONGEST_S:.0f} s into the trace"
        since_1970 = not has_times and units.time_unit != DATE
        return f"{said}: subtract the first where they count from 1970" if since_1970 else said

    wrong = ~timed if has_times else ~np.asarray(pd.Series(columns.arrival, dtype=object).isna())
    faults.add(wrong & counted, reason)
    return arrival if has_times else None


def _seconds(values: Any, unit: str, counted: Mask, from_first: bool) -> Floats:
    """Seconds, NaN where a stamp cannot be read. Dates, and clocks that began before, count from the first counted.

    That is the first of those near the middle one: a stamp that is far off makes none of the others malformed.
    """
    if unit == DATE:
        return _seconds_of_dates(values, counted)
    numbers = _number(values)
    known = np.sort(numbers[counted & np.isfinite(numbers)])
    if not from_first or not len(known):
        return numbers / PER_SECOND[unit]
    near = np.abs(known - known[len(known) // 2]) < LONGEST_S * PER_SECOND[unit]
    return (numbers - float(known[near][0])) / PER_SECOND[unit]


def _seconds_of_dates(values: Any, counted: Mask) -> Floats:
    stamps = pd.Series(values)
    if not pd.api.types.is_datetime64_any_dtype(stamps):  # 2023 is no year, but a number whose unit nobody says
        today = stamps.astype(str).str.strip().str.lower().isin(["now", "today"])  # pandas reads the clock there
        stamps = stamps.mask(today | pd.to_numeric(stamps, errors="coerce").notna())
    dates = pd.to_datetime(stamps, format="ISO8601", errors="coerce", utc=True)
    known = dates[counted].dropna().sort_values()
    if known.empty:
        return np.full(len(dates), np.nan)
    middle = known.iloc[len(known) // 2]
    near = dates.where((dates.dt.year - middle.year).abs() <= 1)  # a span of centuries would not fit into 64 bits
    from_middle = np.asarray((near - middle) / pd.Timedelta(seconds=1), np.float64)
    first = near[counted & (np.abs(from_middle) < LONGEST_S)].min()
    return np.asarray((near - first) / pd.Timedelta(seconds=1), np.float64)


def _ids(columns: Columns, units: Units | None, prompt: Floats, failed: Mask, faults: Faults) -> Any:
    """Lists of ids, [N]; None where no record has any. There is one for each block of a prompt, full or not."""
    if all(ids is None for ids in columns.hash_ids):
        return None
    wrong = np.array([not _are_ids(ids) for ids in columns.hash_ids], np.bool_)
    faults.add(wrong & ~failed, lambda i: f"hash_ids is {shown(columns.hash_ids[i])}, not a list of whole numbers")
    block = units.block_tokens if units is not None else None
    assert block is not None, "units_of says what an id stands for, where there are ids"
    with np.errstate(invalid="ignore"):
        blocks = np.ceil(prompt / block)
    number = np.asarray(columns.num_ids, np.float64)
    faults.add(
        (number != blocks) & faults.right & ~failed,
        lambda i: (
            f"{number[i]:.0f} hash_ids, where {prompt[i]:.0f} tokens are {blocks[i]:.0f} blocks of {block} "
            "(trace.block_tokens)"
        ),
    )
    return columns.hash_ids


def _named(ids: list[list[int]]) -> list[Ints]:
    """The ids as int64, of which only the equality counts: numbered as they come where one of them is beyond it."""
    flat = list(chain.from_iterable(ids))
    try:
        names = np.array(flat, np.int64)
    except OverflowError:
        names = pd.factorize(np.array(flat, object))[0].astype(np.int64)
    ends = np.cumsum([len(each) for each in ids])
    return [names[end - len(each) : end] for each, end in zip(ids, ends, strict=True)]


def _are_ids(ids: Any) -> bool:
    return isinstance(ids, list) and all(type(each) is int for each in ids)


def _check_turns(found: dict[str, Any], failed: Mask, faults: Faults) -> None:
    """Note the turns that do not hold what their conversation has said before."""
    at = np.flatnonzero(faults.right & ~failed)
    columns = {name: values[at] for name, values in found.items() if values is not None and name != "hash_ids"}
    short = without_history(
        columns["conversation_id"],
        columns["prompt_tokens"].astype(np.int64),
        columns["output_tokens"].astype(np.int64),
        columns.get("arrival_s"),
    )
    reasons = {int(at[i]): reason for i, reason in short.items()}
    wrong = np.zeros(len(failed), np.bool_)
    wrong[list(reasons)] = True
    faults.add(wrong, lambda i: reasons[i])
