"""What becomes of malformed records: the first one stops the load, or they are counted and reported."""

import logging
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
    """The malformed records of one source."""

    source: str
    policy: str  # trace.on_bad_record
    count: int = 0
    reasons: list[str] = field(default_factory=list)  # the first few

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise UserError(f"trace.on_bad_record={self.policy}: must be one of {', '.join(POLICIES)}")

    def add(self, number: int, reason: str) -> None:
        """Count record `number` (from 1) as malformed. Raises UserError where such a record stops the load."""
        if self.policy == "error":
            raise UserError(
                f"{self.source}, record {number}: {reason} (trace.on_bad_record=skip counts and reports such records "
                "and goes on)"
            )
        self.count += 1
        if len(self.reasons) < _SHOWN:
            self.reasons.append(f"record {number}: {reason}")

    def report(self) -> None:
        """Log what was skipped, if anything was."""
        if self.count:
            more = f" and {self.count - len(self.reasons)} more" if self.count > len(self.reasons) else ""
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
