"""Tier 1: counts of seeded replays, equal to the committed ones or not. No clock is read: luck has no part in it.

A replay or a count without a counterpart in the baseline cannot be judged; any difference is a regression until
`--accept` says why it is wanted, whichever way it goes.
"""

import csv
import io
import math
from collections.abc import Iterable

from kvarena.harness.regression import baseline
from kvarena.harness.regression.replays import Counts
from kvarena.harness.regression.verdict import Finding, Outcome, Value, Verdict

BASELINE = "exact.csv"
TIER = "Tier 1, exact"
Table = dict[str, Counts]  # replay -> quantity -> value

_EXPORTED = ("steps", "preemptions", "allocations", "maps", "makespan_ps")  # the rest are parts of these


def to_csv(table: Table) -> str:
    """One row per replay; a quantity that a replay does not count is blank."""
    quantities = list(dict.fromkeys(quantity for counts in table.values() for quantity in counts))
    text = io.StringIO()
    writer = csv.DictWriter(text, ["replay", *quantities], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({"replay": replay, **counts} for replay, counts in table.items())
    return text.getvalue()


def from_csv(text: str) -> Table:
    """The table that `to_csv` wrote."""
    rows = csv.DictReader(io.StringIO(text))
    return {row.pop("replay"): {name: value for name, value in row.items() if value != ""} for row in rows}


def judge(base: Table, head: Table) -> Outcome:
    """One finding per difference; figures that agree are only counted."""
    outcome = Outcome(TIER, f"results/baselines/{BASELINE}", values=list(_values(head)))
    for replay in dict.fromkeys([*base, *head]):
        theirs, ours = base.get(replay, {}), head.get(replay, {})
        for quantity in dict.fromkeys([*theirs, *ours]):
            finding = _compare(f"{replay}: {quantity}", theirs.get(quantity), ours.get(quantity))
            outcome.findings.append(finding)
    return outcome


def run(replays: Iterable[tuple[str, Counts]]) -> Outcome:
    """Count, and judge against the committed counts."""
    try:
        base = from_csv(baseline.read(BASELINE))
    except baseline.BaselineError as error:
        return Outcome(TIER, findings=[Finding(BASELINE, "", "", Verdict.UNJUDGEABLE, note=str(error))])
    return judge(base, dict(replays))


def accept(replays: Iterable[tuple[str, Counts]], reason: str) -> list[str]:
    """Make the counts of this tree the baseline, with a reason. Returns how they differ from the last one.

    Raises BaselineError where a count is not a number, UserError without a reason.
    """
    head, path = dict(replays), baseline.BASELINES / BASELINE
    base = from_csv(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if bad := [replay for replay, counts in head.items() if not all(map(_is_number, counts.values()))]:
        raise baseline.BaselineError(f"not a number in the counts of {', '.join(bad)}. Nothing was accepted")
    changes = [_described(replay, base.get(replay), head.get(replay)) for replay in dict.fromkeys([*base, *head])]
    changes = [change for change in changes if change]
    baseline.accept(BASELINE, to_csv(head), reason, changes)
    return changes


def _described(replay: str, base: Counts | None, head: Counts | None) -> str:
    """What changed in one replay, in a line; empty where nothing did."""
    if base is None or head is None:
        return f"{replay}: {'new' if base is None else 'gone'}"
    differing = [name for name in dict.fromkeys([*base, *head]) if base.get(name) != head.get(name)]
    changes = [f"{name} {base.get(name, 'absent')} -> {head.get(name, 'absent')}" for name in differing]
    return f"{replay}: {', '.join(changes)}" if changes else ""


def _compare(figure: str, base: str | None, head: str | None) -> Finding:
    if head is None:
        return Finding(figure, base or "", "", Verdict.UNJUDGEABLE, note="vanished: the head does not count it")
    if not _is_number(head):
        return Finding(figure, base or "", head, Verdict.UNJUDGEABLE, note="not a number")
    if base is None:
        return Finding(figure, "", head, Verdict.UNJUDGEABLE, note="not in the baseline: accept it")
    if base == head:
        return Finding(figure, base, head, Verdict.OK)
    return Finding(figure, base, head, Verdict.REGRESSED, _change(_number(base), _number(head)))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _is_number(text: str) -> bool:
    return math.isfinite(_number(text))


def _change(base: float, head: float) -> str:
    relative = f" ({100 * (head - base) / base:+.2f} %)" if base else ""
    return f"{head - base:+.10g}{relative}"


def _values(head: Table) -> Iterable[Value]:
    """What a dashboard draws of the counts."""
    for replay, counts in head.items():
        for quantity in _EXPORTED:
            if quantity in counts:
                yield Value(f"{replay}: {quantity}", quantity.rsplit("_", 1)[-1], _number(counts[quantity]))
        if "live_pct" in counts:
            yield Value(f"{replay}: live_pct", "%", _number(counts["live_pct"]), larger_is_better=True)
