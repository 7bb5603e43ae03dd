"""Numbers and names as the scorecard prints them."""

import math

from kvarena.harness.scorecard.claims import Claim
from kvarena.harness.scorecard.judge import Answer, Finding

PAPERS = {"pagedattention": "PagedAttention (SOSP 2023)", "vattention": "vAttention (ASPLOS 2025)"}


def number(value: float) -> str:
    """Four digits, and no exponent where a plain number is short."""
    if math.isnan(value):
        return ""
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:,.4g}"


def with_unit(value: float, unit: str) -> str:
    """A number and its unit."""
    return f"{number(value)} {unit}".strip()


def published(claim: Claim) -> str:
    """The published value, or that it is withheld."""
    return "withheld" if claim.published is None else with_unit(claim.published, claim.unit)


def value_of(answer: Answer, unit: str) -> str:
    """The value with its interval, where there is one."""
    text = with_unit(answer.value, unit)
    return text if math.isnan(answer.low) else f"{text} ({number(answer.low)} to {number(answer.high)})"


def evidence_of(finding: Finding) -> str:
    """What the verdict rests on, and what else there is."""
    if finding.answer is None:
        parts = [finding.reason]
    else:
        parts = [finding.answer.source + ("" if finding.settled else " (stands in: shows the direction only)")]
    parts += [f"{value_of(other, finding.claim.unit)} {other.source}" for other in finding.others]
    return "; also ".join(parts)


def figure_name(figure: str) -> str:
    """`fig12a` as a reader writes it: Fig 12a."""
    for short, long in (("fig", "Fig "), ("table", "Table ")):
        if figure.startswith(short):
            return long + figure.removeprefix(short)
    return figure
