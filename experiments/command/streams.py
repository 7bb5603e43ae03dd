"""Standard output and error that end no run: what cannot be spelled is respelled, what nobody reads is dropped."""

import codecs
import errno
import io
import os
import select
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_SPELLED = "kvarena.spelled"
_PLAIN = {"±": "+-"}  # where the terminal has ASCII alone


class _Lasting(io.RawIOBase):
    """A descriptor that takes everything: the first failure (a closed pipe, a full disk) is kept, none raised."""

    def __init__(self, number: int) -> None:
        self._number = number
        self.failure: OSError | None = None

    def write(self, data: "ReadableBuffer", /) -> int:
        while self.failure is None:
            try:
                return os.write(self._number, data)
            except BlockingIOError:  # whoever gave us the descriptor has it not wait: the reader is slow, not gone
                select.select((), (self._number,), ())
            except OSError as error:
                self.failure = error
        return memoryview(data).nbytes

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return os.isatty(self._number)


def make_lasting() -> None:
    """Let the process write through such descriptors."""
    codecs.register_error(_SPELLED, _spelled)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None:  # a descriptor may be closed from the start
            raw = _Lasting(stream.fileno())
            at_once = name == "stderr" or stream.line_buffering or stream.write_through
            buffer = io.BufferedWriter(raw)
            setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, _SPELLED, line_buffering=at_once))


def _spelled(error: UnicodeError) -> tuple[str | bytes, int]:
    """What stands for the next character that an encoding does not have."""
    assert isinstance(error, UnicodeEncodeError)
    error.end = error.start + 1
    plain = _PLAIN.get(error.object[error.start])
    return codecs.backslashreplace_errors(error) if plain is None else (plain, error.end)


def say(line: str) -> None:
    """Print a line that must be read: on standard error too where standard output is gone."""
    print(line, flush=True)
    if sys.stdout is None or _failure() is not None:
        print(line, file=sys.stderr)


def all_is_said() -> bool:
    """Whether all output was taken, or its reader has had enough; says where it was not."""
    failure = _failure()
    if failure is None or failure.errno == errno.EPIPE:
        return True
    print(f"error: standard output: {os.strerror(failure.errno or 0)}; not all of it is written", file=sys.stderr)
    return False


def _failure() -> OSError | None:
    if sys.stdout is None:
        return None
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.failure if isinstance(raw, _Lasting) else None
