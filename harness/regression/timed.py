"""Tier 2: CPU times of base and head, interleaved in one job.

Both sides are child processes that live through the job, so that no import or compilation is timed, and take turns
sample by sample: what the machine does meanwhile, it does to both. A process keeps its layout of memory for life, which
alone can cost some percent; so what looks slower is measured again by a fresh pair, and only what both say counts.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from kvarena.errors import UserError
from kvarena.harness.regression import baseline
from kvarena.harness.regression.revision import base_revision, checkout, subject
from kvarena.harness.regression.side import HEAD, Side, WorkerDied
from kvarena.harness.regression.significance import Comparison, compare
from kvarena.harness.regression.verdict import Finding, Outcome, Value, Verdict

TIER = "Tier 2, CPU times"
SUITE = "timed_suite.py"
ROUNDS = 12  # samples of each side


@dataclass
class Samples:
    """Of one benchmark: seconds by side, or the first thing that went wrong there."""

    base: list[float] = field(default_factory=list)
    head: list[float] = field(default_factory=list)
    base_error: str = ""
    head_error: str = ""


def run(asked: str | None, rounds: int = ROUNDS) -> Outcome:
    """Compare with the revision asked for, or the one that suggests itself."""
    commit = base_revision(asked)
    if commit is None:
        return Outcome(TIER, not_judged="There is no base: no merge base with main, and no parent commit.")
    try:
        with checkout(commit) as tree:
            outcome = compare_trees(tree, HEAD, rounds)
    except UserError as error:
        return Outcome(TIER, not_judged=str(error))
    outcome.against = f"{subject(commit)}; {rounds} + {rounds} samples in turns, the fastest of some runs each"
    return outcome


def compare_trees(base: Path, head: Path, rounds: int = ROUNDS, only: Sequence[str] | None = None) -> Outcome:
    """Measure every benchmark on both trees, those that look slower twice."""
    samples, vanished = _measure(base, head, rounds, only)
    suspects = [name for name, taken in samples.items() if _verdict(taken)[0] is Verdict.REGRESSED]
    again = _measure(base, head, rounds, suspects)[0] if suspects else {}
    outcome = Outcome(TIER)
    for name, taken in samples.items():
        outcome.findings.append(_finding(name, taken, again.get(name)))
        if taken.head:
            spread = f"{1e6 * min(taken.head):.1f} .. {1e6 * max(taken.head):.1f}"
            outcome.values.append(Value(name, "us", 1e6 * median(taken.head), spread=spread))
    for name in vanished:
        note = "vanished: the base's suite has it. Retire it in CHANGES.md, or bring it back"
        outcome.findings.append(Finding(name, "", "", Verdict.UNJUDGEABLE, note=note))
    return outcome


def _measure(
    base: Path, head: Path, rounds: int, only: Sequence[str] | None = None
) -> tuple[dict[str, Samples], list[str]]:
    """Samples by benchmark, and the names that the base's suite has and the head's lacks."""
    with ExitStack() as stack:
        sides = {"base": stack.enter_context(Side(base, SUITE)), "head": stack.enter_context(Side(head, SUITE))}
        names = [name for name in sides["head"].benchmarks if only is None or name in only]
        samples = {name: Samples() for name in names}
        for name in names:
            _warm_up(name, sides, samples[name])
        for turn in range(rounds):
            order = list(sides.items())[:: 1 if turn % 2 else -1]
            for name in names:
                for which, side in order:
                    _take(name, which, side, samples[name])
        gone = [name for name in sides["base"].own if name not in sides["head"].benchmarks]
        return samples, [name for name in gone if name not in baseline.retired()]


def _warm_up(name: str, sides: dict[str, Side], samples: Samples) -> None:
    """One sample of each side at once, which nobody looks at: both compile what they need."""
    for side in sides.values():
        side.ask(name)
    for which, side in sides.items():
        _record(which, side, samples)
    samples.base.clear()
    samples.head.clear()


def _take(name: str, which: str, side: Side, samples: Samples) -> None:
    if not (samples.base_error or samples.head_error):
        side.ask(name)
        _record(which, side, samples)


def _record(which: str, side: Side, samples: Samples) -> None:
    try:
        answer = side.answer()
    except WorkerDied as error:
        answer = f"the process died: {error}"
    if isinstance(answer, float):
        getattr(samples, which).append(answer)
    else:
        setattr(samples, f"{which}_error", answer)


def _verdict(samples: Samples) -> tuple[Verdict, Comparison | None]:
    """The rule, on one measurement."""
    if samples.head_error:
        return Verdict.UNJUDGEABLE, None
    if samples.base_error:
        return Verdict.NEW, None
    comparison = compare(samples.base, samples.head)
    if comparison is None:
        return Verdict.UNJUDGEABLE, None
    return (Verdict.REGRESSED if comparison.slower else Verdict.OK), comparison


def _finding(name: str, first: Samples, second: Samples | None) -> Finding:
    samples = second or first
    verdict, comparison = _verdict(samples)
    if comparison is not None:
        note = f"p = {comparison.p:.2g}" + (", measured again" if second else "")
        return Finding(name, _us(samples.base), _us(samples.head), verdict, f"{comparison.ratio:.2f}x", note)
    error = samples.head_error or samples.base_error
    note = error or f"{len(samples.base)} + {len(samples.head)} samples, and not all of them times"
    return Finding(name, _us(samples.base), _us(samples.head), verdict, note=note)


def _us(samples: list[float]) -> str:
    finite = samples and all(map(math.isfinite, samples))
    return f"{1e6 * median(samples):.1f} us" if finite else ""
