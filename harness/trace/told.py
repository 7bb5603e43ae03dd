"""Lines that a run says of what it was given: on stderr, each once, however often a trace is loaded."""

import sys
from dataclasses import asdict

from kvarena.harness.trace.account import TraceAccount, account_of
from kvarena.harness.trace.config import TraceConfig
from kvarena.harness.trace.trace import Trace

_told: set[str] = set()


def tell(account: TraceAccount) -> None:
    """Say what became of a trace; the same trace at another rate or seed is not said again."""
    tell_once(account.origin, str(account))


def told(config: TraceConfig, trace: Trace) -> Trace:
    """A trace whose lengths alone are used: what became of it is told, and stands in its provenance."""
    account = account_of(config, trace)
    tell(account)
    return trace.noting(account=asdict(account))


def tell_once(key: str, line: str) -> None:
    """Print a line, unless one of that key has been printed."""
    if key not in _told:
        _told.add(key)
        print(line, file=sys.stderr, flush=True)


def forget() -> None:
    """Begin anew, as a run does."""
    _told.clear()
