"""What became of the traces of a whole run: one record of each, over all replays, which differ in rate and seed."""

from collections.abc import Sequence
from typing import NamedTuple

from kvarena.harness.accounts.trace_account import TraceAccount

ACCOUNT = "trace "  # begins the label of rows that say what became of a trace


class Range(NamedTuple):
    """One quantity over the replays of a trace."""

    smallest: float
    largest: float
    unit: str


def by_trace(accounts: Sequence[TraceAccount]) -> list[list[TraceAccount]]:
    """The accounts of each trace, in the order in which it was first told of."""
    traces: dict[str, list[TraceAccount]] = {}
    for account in accounts:
        traces.setdefault(account.origin, []).append(account)
    return list(traces.values())


def ranges(replays: Sequence[TraceAccount]) -> dict[str, Range]:
    """Every quantity that any replay has; what one has not happened to it no time."""
    every = [replay.quantities() for replay in replays]
    units = {name: unit for each in every for name, (_, unit) in each.items()}
    values = {name: [each.get(name, (0.0, unit))[0] for each in every] for name, unit in units.items()}
    return {name: Range(min(values[name]), max(values[name]), unit) for name, unit in units.items()}


def quantities(replays: Sequence[TraceAccount]) -> dict[str, tuple[float, str]]:
    """Name -> value and unit, for summary.csv: `<name>:smallest` and `:largest` where replays differ."""
    found: dict[str, tuple[float, str]] = {}
    for name, (smallest, largest, unit) in ranges(replays).items():
        named = {name: smallest} if smallest == largest else {f"{name}:smallest": smallest, f"{name}:largest": largest}
        found |= {each: (value, unit) for each, value in named.items()}
    return found


def said(replays: Sequence[TraceAccount]) -> str:
    """The line of the first replay, and in what the others differ."""
    differing = [
        f"{name.replace('_', ' ')} {smallest:.4g} to {largest:.4g}"
        for name, (smallest, largest, _) in ranges(replays).items()
        if smallest != largest
    ]
    return f"{replays[0]}; over all replays: {', '.join(differing)}" if differing else str(replays[0])
