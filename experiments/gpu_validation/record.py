"""What a case came to, as a line of `validation.jsonl`. A line is written in one piece, when its case has ended."""

import errno
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

Values = dict[str, Any]  # name, its unit included -> number or word


class Result(StrEnum):
    """How a case ended."""

    PASSED = "passed"
    FAILED = "failed"  # a wrong result, or an error
    FAULTED = "faulted"  # the process touched memory that is not mapped
    TIMED_OUT = "timed out"
    NOT_RUN = "not run"


BAD = frozenset({Result.FAILED, Result.FAULTED, Result.TIMED_OUT})


_FAULTS = ("illegal memory access", "illegal address", "misaligned address", "launch failure", "launch failed")


class FailedError(Exception):
    """The case ran, and its result is wrong."""


class NotRunError(Exception):
    """The case cannot run here; the message says what is missing."""


@dataclass(frozen=True)
class Origin:
    """Where a record was made."""

    device: str = "unknown"  # name of the GPU, or "cpu"
    libraries: str = ""  # those whose version matters
    commit: str = ""


@dataclass(frozen=True)
class Record:
    """One case of one step."""

    step: str
    case: str
    result: Result
    reason: str = ""  # why it did not pass
    values: Values = field(default_factory=dict)
    seconds: float = 0.0
    at: str = ""  # UTC
    origin: Origin = field(default_factory=Origin)
    code: str = ""  # hash of the files that the case uses

    @property
    def key(self) -> tuple[str, str]:
        """What tells it from records of other cases."""
        return self.step, self.case


def now() -> str:
    """The time, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def append(path: Path, record: Record) -> None:
    """Add a line, whole or not at all: in one write, so that whoever is killed leaves whole lines. Raises OSError."""
    line = (json.dumps(asdict(record), default=str) + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        before = os.fstat(descriptor).st_size
        if os.write(descriptor, line) < len(line):  # a disk that is nearly full takes a part
            os.ftruncate(descriptor, before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)


def read(path: Path) -> list[Record]:
    """All records of a file; none where there is no file."""
    if not path.is_file():
        return []
    return [_parsed(line) for line in path.read_text().splitlines() if line.strip()]


def _parsed(line: str) -> Record:
    fields = json.loads(line)
    return Record(**{**fields, "result": Result(fields["result"]), "origin": Origin(**fields["origin"])})


def latest(records: Iterable[Record]) -> dict[tuple[str, str], Record]:
    """The last record of every case; a case that once ran is not hidden by a later "not run"."""
    kept: dict[tuple[str, str], Record] = {}
    for record in records:
        if record.result is not Result.NOT_RUN or record.key not in kept:
            kept[record.key] = record
    return kept


def fault_behind(error: BaseException | None) -> str:
    """The GPU's fault that led to an error; closing what is left of its context fails as well, and says otherwise."""
    found = ""
    while error is not None:
        line = str(error).split("\n")[0]
        if any(words in line.lower().replace("_", " ") for words in _FAULTS):
            found = line
        error = error.__cause__ or error.__context__
    return found
