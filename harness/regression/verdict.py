"""What the gate says: one finding per figure, one outcome per tier, one exit status."""

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum


class Verdict(StrEnum):
    """What became of one figure."""

    OK = "ok"
    REGRESSED = "regressed"
    UNJUDGEABLE = "cannot judge"  # missing, not a number, or from another machine
    NEW = "new"  # the base cannot run it, so there is nothing to compare with


class Status(IntEnum):
    """Exit status of the gate. A regression is certain, so it outranks what cannot be judged."""

    OK = 0
    REGRESSED = 1
    UNJUDGEABLE = 2


@dataclass(frozen=True, slots=True)
class Finding:
    """One figure, base beside head."""

    figure: str  # "paged policy, block by block"; "sharegpt/paged: allocations"
    base: str  # as they are printed
    head: str
    verdict: Verdict
    change: str = ""  # "+3", "1.98x"
    note: str = ""  # the statistics behind the verdict, or why there is none


@dataclass(frozen=True, slots=True)
class Value:
    """One number for the dashboards."""

    figure: str
    unit: str
    value: float
    larger_is_better: bool = False
    spread: str = ""  # printed beside the number


@dataclass
class Outcome:
    """What one tier found."""

    tier: str  # "Tier 1, exact"
    against: str = ""  # what it was compared with
    findings: list[Finding] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)  # of the head
    not_judged: str = ""  # why the tier was not judged at all

    def status(self, required: bool) -> Status:
        """Of this tier. One that was asked for by name must be judged; another may be left out."""
        verdicts = {finding.verdict for finding in self.findings}
        if Verdict.REGRESSED in verdicts:
            return Status.REGRESSED
        if Verdict.UNJUDGEABLE in verdicts or (self.not_judged and required):
            return Status.UNJUDGEABLE
        return Status.OK


def overall(statuses: list[Status]) -> Status:
    """Of several tiers."""
    for status in (Status.REGRESSED, Status.UNJUDGEABLE):
        if status in statuses:
            return status
    return Status.OK
