"""Records, one by one: what format they have, what request each one states, which are malformed."""

from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from itertools import chain
from typing import Any, TypeVar

from kvarena.errors import UserError
from kvarena.harness.trace.bad_records import BadRecords
from kvarena.harness.trace.columns import Columns
from kvarena.harness.trace.formats import Format, LengthFormat, MalformedError, fitting, no_format, shown

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
    columns = Columns([], [], [], [], form.arrival_is, hash_ids=[] if keep_hash_ids else None)
    for number, record in well_formed(records, form, lambda record: _check_types(record, form, keep_hash_ids), bad):
        columns.numbers.append(number)
        columns.prompt.append(record[form.prompt])
        columns.output.append(record[form.output])
        columns.arrival.append(record.get(form.arrival))
        if keep_hash_ids:
            columns.hash_ids.append(record["hash_ids"])
    if all(stamp is None for stamp in columns.arrival):
        columns.arrival = None
    return columns


def _check_types(record: Mapping[str, Any], form: LengthFormat, keep_hash_ids: bool) -> Mapping[str, Any]:
    for key in (form.prompt, form.output, form.arrival):
        allowed = (str, datetime) if key == form.arrival and form.arrival_is == "date" else (int, float)
        value = record.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, allowed)):
            raise MalformedError(f"{key} is {shown(value)}, not a {'date' if str in allowed else 'number'}")
        if isinstance(value, int) and abs(value) > 2**53:  # nor would it convert to a float
            raise MalformedError(f"{key} is {shown(value)}, beyond any trace")
    ids = record.get("hash_ids")
    if keep_hash_ids and not (isinstance(ids, list) and all(type(each) is int for each in ids)):
        raise MalformedError(f"hash_ids is {shown(ids)}, not a list of whole numbers")
    return record
