"""Length records of CSV text. A line is a record: no value holds an end of line, so that a quote that nothing closes
costs the line it stands on, and none below.
"""

import csv
import json
import re
import sys
from array import array
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from kvarena.errors import UserError
from kvarena.harness.files.text_file import check_text
from kvarena.harness.trace.bad_records import BadRecords
from kvarena.harness.trace.columns import Columns
from kvarena.harness.trace.config import TraceConfig
from kvarena.harness.trace.formats import CONVERSATION, DATE, HASH_IDS, LengthFormat, fitting, no_format, shown
from kvarena.harness.trace.records import number_of_ids

_SEPARATORS = ",;\t|"
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*", re.ASCII | re.IGNORECASE)  # no 1_000, 0x10, inf


class _Column(NamedTuple):
    """A column that the format has, and what is read of it so far."""

    place: int
    read: Callable[[str], Any]
    values: Any


def read_csv(lines: Iterable[str], config: TraceConfig, bad: BadRecords) -> tuple[LengthFormat, Columns]:
    """Columns of the lines below a header; a line that does not fit it goes to `bad`. Blank lines do not count.

    lines: of text, at least one not blank. Raises UserError for a header that fits no format, and for one alone.
    """
    csv.field_size_limit(sys.maxsize)  # of the process: a long value is no fault
    records = filter(str.strip, lines)
    form, names, separator = _header(next(records), config.format, bad.source)
    columns = _columns(form, names, config, bad.source)
    numbers, number = array("q"), 0
    for number, line in enumerate(records, start=1):
        try:
            fields = _fields(line, separator, len(names))
            values = [column.read(fields[column.place]) for column in columns.values()]
        except ValueError as error:
            bad.add(number, str(error))
        else:
            numbers.append(number)
            for column, value in zip(columns.values(), values, strict=True):
                column.values.append(value)
    if not number:
        raise UserError(f"{bad.source}: holds no record, only a header")
    read = {
        name: np.asarray(each.values) if isinstance(each.values, array) else each.values
        for name, each in columns.items()
    }
    ids = read.get(HASH_IDS)
    return form, Columns(
        numbers=np.asarray(numbers),
        prompt=read[form.prompt],
        output=read[form.output],
        form=form,
        arrival=read.get(form.arrival),
        conversation=read.get(CONVERSATION),
        num_ids=None if ids is None else [number_of_ids(each) for each in ids],
        hash_ids=None if config.keep_hash_ids is False else ids,
        others=[name for name in names if name not in columns],
    )


def _header(line: str, format_name: str | None, source: str) -> tuple[LengthFormat, list[str], str]:
    """Format, names of the columns and separator: the first by which the names fit a format."""
    try:
        check_text(line)
        if "\0" in line:
            raise ValueError("a NUL byte is no text")
    except ValueError as error:
        raise UserError(f"{source}: its first line is no text: {error}") from error
    by_separator = {each: [name.strip() for name in next(csv.reader([line], delimiter=each))] for each in _SEPARATORS}
    for separator, names in by_separator.items():
        form = fitting(names, format_name)
        if form is None:
            continue
        if not isinstance(form, LengthFormat):
            raise UserError(f"{source}: {form.name} is read from JSON, not from CSV")
        return form, names, separator
    raise no_format(by_separator[","], format_name, source)


def _columns(form: LengthFormat, names: list[str], config: TraceConfig, source: str) -> dict[str, _Column]:
    """What is read of each column that there is. Raises UserError for one that stands twice."""
    kinds: dict[str, Callable[[str], Any]] = {
        form.prompt: partial(_length, "prompt"),
        form.output: partial(_length, "output"),
        form.arrival: str if form.time_unit == DATE and config.time_unit is None else _time,
        CONVERSATION: str,
        HASH_IDS: _list,
    }
    for name in kinds:
        if names.count(name) > 1:
            raise UserError(f"{source}: column {name} stands twice")
    return {
        name: _Column(names.index(name), read, [] if read in (str, _list) else array("d"))
        for name, read in kinds.items()
        if name in names
    }


def _fields(line: str, separator: str, width: int) -> list[str]:
    """The values of a line. Raises ValueError for one that does not fit the header."""
    if not line.isascii():
        check_text(line)
    if '"' not in line:
        fields = line.rstrip("\n").split(separator)
    elif line.count('"') % 2:
        raise ValueError("an odd number of quotes: one that nothing closes, or a value with an end of line in it")
    else:
        try:
            fields = next(csv.reader([line], delimiter=separator, strict=True))
        except csv.Error as error:
            raise ValueError(f"quotes out of place: {error}") from error
    if len(fields) != width:
        raise ValueError(f"{len(fields)} fields, the header has {width}")
    return fields


def _length(what: str, text: str) -> float:
    if not (text.isdecimal() and text.isascii()) and not _NUMBER.fullmatch(text):
        raise ValueError(f"{what} length is {f'{shown(text)}, not a number' if text.strip() else 'empty'}")
    return float(text)


def _time(text: str) -> float:
    """NaN where the field is empty: no time is recorded."""
    if not text.strip():
        return np.nan
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"arrival is {shown(text)}, not a number")
    return float(text)


def _list(text: str) -> Any:
    """A list as JSON writes it, `[1, 2]`; None for an empty field, the text itself for any other."""
    try:
        return json.loads(text) if text.strip() else None
    except (ValueError, RecursionError):
        return text
