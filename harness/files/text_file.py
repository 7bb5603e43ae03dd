"""The text of a file: gzip is looked through, UTF-16 and UTF-32 are told by their first bytes; all else is UTF-8."""

import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import IO, TextIO, cast

from kvarena.errors import UserError
from kvarena.harness.files.what_it_is import GZIP, refuse

_BEGINNING = 1024  # bytes that tell what a file is


@contextmanager
def opened(path: Path) -> Iterator[TextIO]:
    """The text, every end of line a line feed. What its encoding does not have comes as half of a surrogate pair.

    Raises UserError for what is no text, and for a file that breaks off or cannot be read.
    """
    try:
        with path.open("rb") as plain:
            zipped = plain.read(len(GZIP)) == GZIP
            plain.seek(0)
            file = cast(IO[bytes], gzip.GzipFile(fileobj=plain)) if zipped else plain
            beginning = file.read(_BEGINNING)
            refuse(beginning, path)
            encoding = json.detect_encoding(beginning)
            file.seek(0)
            kept = "surrogateescape" if encoding.startswith("utf-8") else "surrogatepass"  # for `check_text` to see
            yield TextIOWrapper(file, encoding, errors=kept)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: is gzip, and broken or cut short: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: begins like {encoding}, and is not: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def check_text(text: str) -> None:
    """Raises ValueError for text that cannot be written: half of a surrogate pair, or a byte that was not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(
            f"byte 0x{code - 0xDC00:02x} is not UTF-8"
            if 0xDC80 <= code <= 0xDCFF
            else f"\\u{code:04x} is half of a surrogate pair, which is no text"
        ) from None
