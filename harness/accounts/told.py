"""Lines that a run says of what it was given and what it refused: on stderr, each once, however often it happens."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from operator import gt
from typing import Any

from kvarena.harness.accounts.refusals import Refusals
from kvarena.harness.accounts.trace_account import TraceAccount, account_of
from kvarena.harness.trace.config import TraceConfig
from kvarena.harness.trace.trace import Trace

Fact = TraceAccount | Refusals  # what became of a trace, and what a system refused of it

_losses: dict[str, tuple[int, ...]] = {}  # of each trace or system, by its origin: the most that have been told
_hearing: list[list[Fact]] = []


def tell(fact: Fact) -> None:
    """Say what became of a trace; at another rate or seed again where more is repeated, cut, left out or refused."""
    for heard in _hearing:
        if fact not in heard:
            heard.append(fact)
    told = _losses.get(fact.origin, (-1,) * len(fact.losses))
    if any(map(gt, fact.losses, told)):
        _losses[fact.origin] = tuple(map(max, fact.losses, told))
        _say(str(fact))


@contextmanager
def heard() -> Iterator[list[Fact]]:
    """All that is told inside, in order, each once."""
    facts: list[Fact] = []
    _hearing.append(facts)
    try:
        yield facts
    finally:
        _hearing[:] = [each for each in _hearing if each is not facts]


def accounts(facts: Sequence[Fact]) -> list[TraceAccount]:
    """Those of traces."""
    return [fact for fact in facts if isinstance(fact, TraceAccount)]


def refusals(facts: Sequence[Fact]) -> list[Refusals]:
    """Those of systems."""
    return [fact for fact in facts if isinstance(fact, Refusals)]


def as_plain(facts: Sequence[Fact]) -> dict[str, list[dict[str, Any]]]:
    """What was told, for JSON."""
    return {"accounts": list(map(asdict, accounts(facts))), "refusals": list(map(asdict, refusals(facts)))}


def tell_again(plain: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Tell what `as_plain` made plain, as JSON gives it back."""
    for account in plain["accounts"]:
        tell(TraceAccount.of_plain(account))
    for refused in plain["refusals"]:
        tell(Refusals(**refused))


def told(config: TraceConfig, trace: Trace) -> Trace:
    """A trace whose lengths alone are used: what became of it is told, and stands in its provenance."""
    account = account_of(config, trace)
    tell(account)
    return trace.noting(account=asdict(account))


def tell_once(line: str) -> None:
    """Say a line, unless it has been said."""
    if line not in _losses:
        _losses[line] = ()
        _say(line)


def forget() -> None:
    """Begin anew, as a run does."""
    _losses.clear()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
