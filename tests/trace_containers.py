"""Records as a file in one container or another."""

import io
import json
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet
from trace_makers import Record


def write_csv(records: Sequence[Record], quote_all: bool, separator: str) -> str:
    """Rows below a header; text with a separator or quotes is quoted, or everything is."""

    def cell(value: object) -> str:
        text = "" if value is None else str(value)
        return '"' + text.replace('"', '""') + '"' if quote_all or set(text) & {'"', separator} else text

    fields = list(dict.fromkeys(key for record in records for key in record))
    rows = [fields, *([record.get(key) for key in fields] for record in records)]
    return "".join(separator.join(map(cell, row)) + "\n" for row in rows)


def write_json(records: Sequence[object], lines: bool, indent: int | None) -> str:
    """One object a line, or an array of them."""
    if lines:
        return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    if indent:
        return json.dumps(records, ensure_ascii=False, indent=indent)
    return "[" + ",\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "]"


def write_parquet(records: Sequence[Record]) -> bytes | None:
    """A row each; None where they do not fit into columns of one type."""
    file = io.BytesIO()
    try:
        pa.parquet.write_table(pa.Table.from_pylist(records), file)
    except (pa.ArrowException, OverflowError, TypeError, AttributeError):
        return None
    return file.getvalue()
