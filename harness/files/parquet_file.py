"""Records of a parquet file, row by row."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from kvarena.errors import UserError
from kvarena.harness.files.what_it_is import PARQUET


def is_parquet(path: Path) -> bool:
    """Whether it begins like one."""
    with path.open("rb") as file:
        return file.read(len(PARQUET)) == PARQUET


def parquet_records(path: Path, bad: Callable[[int, str], None]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(record number from 1, row) of every row that can be read; the others go to `bad`, with a reason.

    Raises UserError for a file that is broken or cut short.
    """
    number = 0
    try:
        with pa.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_struct_array():
                    number += 1
                    try:
                        record = row.as_py()
                    except Exception as error:  # text that is not UTF-8, a time before year 1, and what else there is
                        bad(number, str(error))
                    else:
                        yield number, record
    except UserError:
        raise
    except Exception as error:  # whatever pyarrow makes of a broken file: its names need not be text either
        raise UserError(
            f"{path}: begins like parquet, and cannot be read as such after {number} rows: {error}"
        ) from error
