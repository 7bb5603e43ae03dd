"""What becomes of malformed records: the first one stops the load, or they are counted and reported."""

import logging
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvarena.errors import UserError

_log = logging.getLogger(__name__)
_SHOWN = 5  # reasons told in full
POLICIES = ("error", "skip")


@dataclass(slots=True)
class BadRecords:
    """The malformed records of one source. They come in no order: some are seen only when all have been read."""

    source: str
    policy: str  # trace.on_bad_record
    count: int = 0
    _first: list[tuple[int, str]] = field(default_factory=list)  # number and reason of the first few, in order

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise UserError(f"trace.on_bad_record={self.policy}: must be one of {', '.join(POLICIES)}")

    @property
    def reasons(self) -> list[str]:
        """Of the first few."""
        return [f"record {number}: {reason}" for number, reason in self._first]

    def add(self, number: int, reason: str) -> None:
        """Count record `number` (from 1) as malformed."""
        self.count += 1
        if len(self._first) < _SHOWN or number < self._first[-1][0]:
            insort(self._first, (number, reason))
            del self._first[_SHOWN:]

    def stop(self) -> None:
        """Raises UserError where the first of the records so far stops the load."""
        if self.count and self.policy == "error":
            raise UserError(
                f"{self.source}, {self.reasons[0]} (trace.on_bad_record=skip counts and reports such records "
                "and goes on)"
            )

    def report(self) -> None:
        """Stop, or log what was skipped, if anything was."""
        self.stop()
        if self.count:
            more = f" and {self.count - len(self._first)} more" if self.count > len(self._first) else ""
            _log.warning(
                "%s: skipped %d malformed records: %s%s", self.source, self.count, "; ".join(self.reasons), more
            )


class Faults:
    """What is wrong with the records of a table, column by column: the first fault of a record is its reason."""

    def __init__(self, count: int) -> None:
        self.right: NDArray[np.bool_] = np.ones(count, np.bool_)  # [N]: without a fault so far
        self._found: list[tuple[NDArray[np.bool_], Callable[[int], str]]] = []

    def add(self, wrong: NDArray[np.bool_], reason: Callable[[int], str]) -> None:
        """Note a fault of the records `wrong` [N]; `reason` gives that of the record at a position."""
        self._found.append((wrong, reason))
        self.right &= ~wrong

    def tell(self, numbers: Any, bad: BadRecords) -> None:
        """Every malformed record goes to `bad`, in order; `numbers` [N] are theirs in the source."""
        for i in np.flatnonzero(~self.right).tolist():
            bad.add(int(numbers[i]), next(reason(i) for wrong, reason in self._found if wrong[i]))
