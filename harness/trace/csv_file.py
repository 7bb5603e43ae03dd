"""Length records of a CSV file, column by column."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv

from kvarena.errors import UserError
from kvarena.harness.trace.bad_records import BadRecords
from kvarena.harness.trace.columns import Columns
from kvarena.harness.trace.formats import LengthFormat, fitting, no_format


def read_csv(path: Path, format_name: str | None, bad: BadRecords) -> tuple[LengthFormat, Columns]:
    """Columns of a CSV with a header line, as text; rows of the wrong width go to `bad`. Blank lines do not count.

    Raises UserError for a header that fits no format, and for what is no CSV.
    """
    with path.open(encoding="utf-8-sig") as file:
        lines = csv.reader(file)
        header = [name.strip() for name in next(filter(any, lines), [])]
    found = fitting(header, format_name)
    if found is None or len(set(header)) < len(header):
        raise no_format(header, format_name, str(path))
    if not isinstance(found, LengthFormat):
        raise UserError(f"{path}: {found.name} is read from JSON, not from CSV")
    table, ragged = _read(path, header, lines.line_num)
    for number, reason in ragged.items():
        bad.add(number, reason)
    total = len(table) + len(ragged)
    return found, Columns(
        numbers=np.delete(np.arange(1, total + 1), [number - 1 for number in ragged]),
        prompt=_column(table, found.prompt),
        output=_column(table, found.output),
        arrival=_column(table, found.arrival) if found.arrival in header else None,
        arrival_is=found.arrival_is,
        conversation=_column(table, "conversation_id") if "conversation_id" in header else None,
    )


def _column(table: pa.Table, name: str) -> Any:
    return table[name].to_numpy(zero_copy_only=False)


def _read(path: Path, header: list[str], header_lines: int) -> tuple[pa.Table, dict[int, str]]:
    """The rows of the header's width below its lines, all text, and for the others record number: reason."""
    ragged: dict[int, str] = {}

    def note(row: pa.csv.InvalidRow) -> str:
        ragged[row.number - 1] = f"{row.actual_columns} fields, the header has {row.expected_columns}"
        if lines := row.text.count("\n"):
            ragged[row.number - 1] += f"; a quote that nothing closes makes {lines + 1} lines one row"
        return "skip"

    try:
        table = pa.csv.read_csv(
            path,
            read_options=pa.csv.ReadOptions(use_threads=False, column_names=header, skip_rows=header_lines),
            parse_options=pa.csv.ParseOptions(invalid_row_handler=note),
            convert_options=pa.csv.ConvertOptions(
                column_types={name: pa.string() for name in header}, strings_can_be_null=False
            ),
        )
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: not a CSV file: {error}") from error
    return table, ragged
