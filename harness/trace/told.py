"""Lines that a run says of what it was given: on stderr, each once, however often a trace is loaded."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from operator import gt

from kvarena.harness.trace.account import TraceAccount, account_of
from kvarena.harness.trace.config import TraceConfig
from kvarena.harness.trace.trace import Trace

_told: set[str] = set()
_losses: dict[str, tuple[int, ...]] = {}  # of each trace, by its origin: the most that have been told
_hearing: list[list[TraceAccount]] = []


def tell(account: TraceAccount) -> None:
    """Say what became of a trace; at another rate or seed again where more is repeated, cut or left out."""
    for heard in _hearing:
        if account not in heard:
            heard.append(account)
    told = _losses.get(account.origin, (-1,) * len(account.losses))
    if any(map(gt, account.losses, told)):
        _losses[account.origin] = tuple(map(max, account.losses, told))
        _say(str(account))


@contextmanager
def heard() -> Iterator[list[TraceAccount]]:
    """The accounts of all that is told inside, in order, each once."""
    accounts: list[TraceAccount] = []
    _hearing.append(accounts)
    try:
        yield accounts
    finally:
        _hearing[:] = [each for each in _hearing if each is not accounts]


def told(config: TraceConfig, trace: Trace) -> Trace:
    """A trace whose lengths alone are used: what became of it is told, and stands in its provenance."""
    account = account_of(config, trace)
    tell(account)
    return trace.noting(account=asdict(account))


def tell_once(key: str, line: str) -> None:
    """Print a line, unless one of that key has been printed."""
    if key not in _told:
        _told.add(key)
        _say(line)


def forget() -> None:
    """Begin anew, as a run does."""
    _told.clear()
    _losses.clear()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
