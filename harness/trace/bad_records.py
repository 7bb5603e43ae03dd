"""What becomes of malformed records: the first one stops the load, or they are counted and reported."""

import logging
from dataclasses import dataclass, field

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
