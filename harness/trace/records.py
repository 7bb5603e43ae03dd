"""Records, one by one: what format they have, what request each one states, which are malformed."""

from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from itertools import chain
from math import nan
from types import NoneType
from typing import Any, TypeVar

from kvarena.errors import UserError
from kvarena.harness.trace.bad_records import BadRecords
from kvarena.harness.trace.columns import Columns
from kvarena.harness.trace.formats import (
    CONVERSATION,
    DATE,
    HASH_IDS,
    Format,
    LengthFormat,
    MalformedError,
    fitting,
    no_format,
    shown,
    text_field,
)

Records = Iterator[tuple[int, Any]]  # (number from 1, value)
Stated = TypeVar("Stated")


def detect(records: Records, format_name: str | None, bad: BadRecords) -> tuple[Format, Records]:
    """The format of the first record that fits one, and the records again, from the first. Raises UserError.

    bad: where those go that cannot be read.
    """
    passed, fields = [], dict[str, None]()
    for number, value in records:
        passed.append((number, value))
        if isinstance(value, Mapping):
            form = fitting(value, format_name)
            if form is not None:
                return form, chain(passed, records)
            fields |= dict.fromkeys(map(str, value))
    if not passed:
        bad.stop()
        raise UserError(f"{bad.source}: holds no record{''.join(f'; {reason}' for reason in bad.reasons)}")
    raise no_format(fields, format_name, bad.source)


def looks_like(value: Any, format_name: str | None) -> bool:
    """Whether a value is a record of that format, of any if None."""
    return isinstance(value, Mapping) and fitting(value, format_name) is not None


def well_formed(
    records: Records, form: Format, state: Callable[[Mapping[str, Any]], Stated], bad: BadRecords
) -> Iterator[tuple[int, Stated]]:
    """(number, what the record states) of each record that `state` can read; the others go to `bad`."""
    for number, record in records:
        try:
            if not isinstance(record, Mapping):
                raise MalformedError(f"{shown(record)} is not an object with fields")
            for key in form.required:
                if key not in record:
                    raise MalformedError(f"no field {key}")
            stated = state(record)
        except MalformedError as error:
            bad.add(number, str(error))
        except UserError:
            raise
        except Exception as error:  # whatever else a record can do: nested too deep to be shown, perhaps
            bad.add(number, f"{type(error).__name__}: {error}")
        else:
            yield number, stated


def length_columns(records: Records, form: LengthFormat, keep_hash_ids: bool, bad: BadRecords) -> Columns:
    """Columns of records that state token counts."""
    columns = Columns([], [], [], form, [], [], num_ids=[], hash_ids=[] if keep_hash_ids else None)
    has_ids, fields = False, dict[str, None]()
    for number, record in well_formed(records, form, lambda record: _check_types(record, form), bad):
        columns.numbers.append(number)
        columns.prompt.append(record[form.prompt])
        columns.output.append(record[form.output])
        columns.arrival.append(record.get(form.arrival))
        columns.conversation.append(_id_text(record.get(CONVERSATION)))
        has_ids |= CONVERSATION in record
        fields |= dict.fromkeys(record)
        ids = record.get(HASH_IDS)
        columns.num_ids.append(number_of_ids(ids))
        if keep_hash_ids:
            columns.hash_ids.append(ids)
    if all(stamp is None for stamp in columns.arrival):
        columns.arrival = None
    if not has_ids:
        columns.conversation = None
    read = (form.prompt, form.output, form.arrival, CONVERSATION, HASH_IDS)
    columns.others = [name for name in fields if name not in read]
    return columns


def number_of_ids(ids: Any) -> float:
    """How many ids of blocks a record has; NaN where there are none to be counted."""
    return len(ids) if isinstance(ids, list) else nan


def _check_types(record: Mapping[str, Any], form: LengthFormat) -> Mapping[str, Any]:
    for key in (form.prompt, form.output, form.arrival):
        dates = key == form.arrival and form.time_unit == DATE
        allowed = (str, datetime, int, float) if dates else (int, float)
        value = record.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, allowed)):
            raise MalformedError(f"{key} is {shown(value)}, not a {'date' if dates else 'number'}")
        if isinstance(value, int) and abs(value) > (2**63 if key == form.arrival else 2**53):  # no float states it
            raise MalformedError(f"{key} is {shown(value)}, beyond any trace")
        if isinstance(value, str):
            text_field(record, key)  # that it can be written
    talk = record.get(CONVERSATION)
    if isinstance(talk, bool) or not isinstance(talk, (str, int, float, NoneType)):
        raise MalformedError(f"{CONVERSATION} is {shown(talk)}, neither a text nor a number")
    return record


def _id_text(value: Any) -> str:
    """A conversation's id as a text that no other id has, empty where there is none."""
    blank = value is None or value != value or (isinstance(value, str) and not value.strip())
    return "" if blank else repr(value)
