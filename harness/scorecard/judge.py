"""What becomes of a claim: its value from the runs that can settle it, and the verdict.

A value settles a claim if every row it rests on earned a name of the claim's paper (`run/published.py`), if it has
the claim's clock, and was measured on a GPU where the claim needs one. Any other value, a row of our own or a stand-in
on another device, can only show the direction. A modelled value never settles what is to be measured: it is shown, and
the claim counts as not run.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum

import pandas as pd

from kvarena.harness.scorecard.claims import ARITHMETIC, Claim
from kvarena.harness.scorecard.expression import Point, evaluate
from kvarena.harness.scorecard.kept_runs import KeptRun, MissingPointError, Published


class Verdict(StrEnum):
    """All that can be said of a claim."""

    HOLDS = "holds"
    DIRECTION = "holds in direction"
    FAILS = "does not hold"
    UNDECIDED = "undecided"  # measured too coarsely: the interval lies on both sides
    PREDICTED = "predicted"  # the published value is withheld
    NOT_RUN = "not run"


@dataclass(frozen=True, slots=True)
class Answer:
    """The value that one run gives to a claim."""

    value: float
    low: float  # 95 % interval, NaN where the rows have none
    high: float
    evidence: str  # the kinds of evidence of its rows: exact, measured, predicted, calibrated, conditional
    clock: str  # of its rows: one modelled row makes it modelled; empty: arithmetic
    devices: str
    run: KeptRun | None  # None: arithmetic
    papers: frozenset[str] = frozenset()  # whose names its rows have: ours, where they earned none

    @property
    def on_gpu(self) -> bool:
        """Whether it was measured on a GPU."""
        return self.clock == "measured" and self.devices != "cpu"

    @property
    def source(self) -> str:
        """Clock, device and kind of evidence."""
        if self.run is None:
            return self.evidence
        return f"{self.clock} on {self.devices}" + ("" if self.evidence == self.clock else f"; {self.evidence}")


@dataclass(frozen=True, slots=True)
class Finding:
    """A claim, judged."""

    claim: Claim
    verdict: Verdict
    answer: Answer | None = None  # that the verdict rests on
    settled: bool = False  # by a run of the claim's own clock and kind of device
    others: list[Answer] = field(default_factory=list)  # that other runs give
    reason: str = ""  # why it was not run

    @property
    def deviation(self) -> str:
        """From the published value, in the terms of the tolerance; empty where there is none."""
        published = self.claim.published
        if self.answer is None or published is None or self.claim.tolerance.kind == "below":
            return ""
        if self.claim.tolerance.kind == "abs" or published == 0:
            unit = {"%": "points", "x": ""}.get(self.claim.unit, self.claim.unit)
            return f"{self.answer.value - published:+.2g} {unit}".strip()
        return f"{100 * (self.answer.value / published - 1):+.1f} %"


def judge(claim: Claim, runs: Iterable[KeptRun], published: Published) -> Finding:
    """Answer a claim from the runs there are."""
    if claim.experiment == ARITHMETIC:
        value = evaluate(claim.expression, lambda point: published.value(claim.paper, point))
        answer = Answer(value, math.nan, math.nan, "arithmetic", "", "", None)
        return Finding(claim, _verdict(claim, answer, settles=True), answer, settled=True)
    own: list[Answer] = []
    others: list[Answer] = []
    reasons: list[str] = []
    stand_in = claim.stand_in or ("", "")
    for run in runs:
        for experiment, expression in ((claim.experiment, claim.expression), stand_in):
            if run.experiment == experiment:
                try:
                    answer = answered(claim, expression, run)
                except MissingPointError as error:
                    reasons.append(f"{run.name} has {error}")
                else:
                    (own if expression == claim.expression and _settles(claim, answer) else others).append(answer)
    if own:
        return Finding(claim, _verdict(claim, own[0], settles=True), own[0], True, own[1:] + others)
    hints = [answer for answer in others if claim.clock != "measured" or answer.clock == "measured"]
    if hints:
        rest = [a for a in others if a is not hints[0]]
        return Finding(claim, _verdict(claim, hints[0], settles=False), hints[0], False, rest)
    return Finding(claim, Verdict.NOT_RUN, others=others, reason="; ".join(reasons) or f"no run of {claim.experiment}")


def _settles(claim: Claim, answer: Answer) -> bool:
    if answer.papers != {claim.paper}:
        return False
    if claim.needs_gpu:
        return answer.on_gpu
    return claim.clock in ("any", "none", answer.clock)


def _verdict(claim: Claim, answer: Answer, settles: bool) -> Verdict:
    if claim.published is None:
        return Verdict.PREDICTED
    if settles and claim.tolerance.met(answer.value, claim.published):
        return Verdict.HOLDS
    if claim.direction is None:
        return Verdict.FAILS
    low, high = (answer.value if math.isnan(end) else end for end in (answer.low, answer.high))
    if claim.direction.met(low) and claim.direction.met(high):
        return Verdict.DIRECTION
    reached = low < claim.direction.high and high > claim.direction.low
    return Verdict.UNDECIDED if reached else Verdict.FAILS


def answered(claim: Claim, expression: str, run: KeptRun) -> Answer:
    """The expression's value over a run's rows. Raises MissingPointError where a row is missing."""
    used: dict[Point, pd.Series] = {}

    def look_up(point: Point) -> float:
        used[point] = run.row(claim.paper, point)
        return float(used[point]["value"])

    try:
        value = evaluate(expression, look_up)
    except ZeroDivisionError:
        raise MissingPointError(f"a zero that {claim.id} divides by") from None
    low, high = _interval(lambda find: evaluate(expression, find), used, value)
    kinds = dict.fromkeys(str(row["evidence"]) for row in used.values())
    devices = dict.fromkeys(str(row["device"]) for row in used.values())
    clock = "modelled" if "modelled" in {str(row["clock"]) for row in used.values()} else "measured"
    papers = frozenset(str(row["paper"]) for row in used.values())
    return Answer(value, low, high, " and ".join(kinds), clock, ", ".join(devices), run, papers)


def _interval(
    value_of: Callable[[Callable[[Point], float]], float], used: dict[Point, pd.Series], value: float
) -> tuple[float, float]:
    """95 % interval of the value, its inputs taken as independent: root of the summed squares of each one's part."""
    if not used or any(pd.isna(row["ci_low"]) for row in used.values()):
        return math.nan, math.nan
    down = up = 0.0
    for moved, row in used.items():
        ends = []
        for end in (float(row["ci_low"]), float(row["ci_high"])):
            ends.append(value_of(lambda p, m=moved, e=end: e if p == m else float(used[p]["value"])) - value)  # type: ignore[misc]
        down += min(0.0, *ends) ** 2
        up += max(0.0, *ends) ** 2
    return value - math.sqrt(down), value + math.sqrt(up)
