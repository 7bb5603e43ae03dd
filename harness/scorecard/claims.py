"""The claims of both papers, as results/published/claims.csv lists them."""

import csv
import re
from dataclasses import dataclass
from pathlib import Path

from kvarena.errors import UserError
from kvarena.harness.paths import PUBLISHED
from kvarena.harness.scorecard.rule import Direction, Tolerance

CLAIMS = PUBLISHED / "claims.csv"
WITHHELD = "withheld"
ARITHMETIC = "arithmetic"  # in the column `experiment`: nothing needs to run, the published values suffice
COLUMNS = (
    "id", "paper", "section", "claim", "published", "unit", "experiment", "expression", "tolerance", "direction",
    "clock", "gpu", "note", "stand_in",
)  # fmt: skip
_CLOCKS = ("measured", "modelled", "any", "none")


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim: where it stands, what it says, and how it is judged."""

    id: str
    paper: str
    section: str
    text: str
    published: float | None  # None: withheld
    unit: str
    experiment: str  # that yields what the expression asks for
    expression: str
    tolerance: Tolerance
    direction: Direction | None
    clock: str  # that a run must have to settle it: measured, modelled, any; none: arithmetic or counts
    needs_gpu: bool
    note: str
    stand_in: tuple[str, str] | None  # (experiment, expression) on this machine's CPU, which shows the direction

    @property
    def rule(self) -> str:
        """Tolerance and direction, as a reader sees them."""
        direction = "" if self.direction is None else f"; direction: {self.direction.told}"
        return self.tolerance.told(self.unit) + direction


def load_claims(path: Path = CLAIMS) -> list[Claim]:
    """All claims, in the file's order. Raises UserError with file and line for whatever is wrong."""
    if not path.is_file():
        raise UserError(f"{path}: no such file, and it holds the claims")
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames is None or tuple(reader.fieldnames) != COLUMNS:
            raise UserError(f"{path}: line 1: the columns are to be {', '.join(COLUMNS)}")
        claims = [_claim(record, f"{path}: line {reader.line_num}") for record in reader]
    twice = {claim.id for claim in claims if sum(other.id == claim.id for other in claims) > 1}
    if twice:
        raise UserError(f"{path}: more than one claim is called {', '.join(sorted(twice))}")
    return claims


def claim_named(claim_id: str) -> Claim:
    """One claim. Raises UserError with the ids that exist."""
    claims = {claim.id: claim for claim in load_claims()}
    if claim_id not in claims:
        raise UserError(f"claim={claim_id}: no such claim. There are: {', '.join(claims)}")
    return claims[claim_id]


def _claim(record: dict[str, str], where: str) -> Claim:
    if None in record.values() or None in record:
        raise UserError(f"{where}: not as many fields as columns")
    try:
        return _parsed(record)
    except (UserError, ValueError) as error:
        raise UserError(f"{where}: {error}") from error


def _parsed(record: dict[str, str]) -> Claim:
    if record["clock"] not in _CLOCKS or record["gpu"] not in ("yes", "no"):
        raise UserError(f"clock {record['clock']!r} of {_CLOCKS}, gpu {record['gpu']!r} of yes, no")
    if not re.fullmatch(r"[A-Z]+-[0-9]+", record["id"]):
        raise UserError(f"id {record['id']!r}: letters, a dash, a number")
    experiment, separator, expression = record["stand_in"].partition(": ")
    return Claim(
        id=record["id"],
        paper=record["paper"],
        section=record["section"],
        text=record["claim"],
        published=None if record["published"] == WITHHELD else float(record["published"]),
        unit=record["unit"],
        experiment=record["experiment"],
        expression=record["expression"],
        tolerance=Tolerance.parse(record["tolerance"]),
        direction=Direction.parse(record["direction"]),
        clock=record["clock"],
        needs_gpu=record["gpu"] == "yes",
        note=record["note"],
        stand_in=(experiment, expression) if separator else None,
    )
