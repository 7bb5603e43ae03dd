"""Lines that a run says of what it was given: on stderr, each once, however often a trace is loaded."""

import sys
from dataclasses import asdict

from kvarena.harness.trace.account import TraceAccount, account_of
from kvarena.harness.trace.config import TraceConfig
from kvarena.harness.trace.trace import Trace

_told: set[str] = set()
_accounts: list[TraceAccount] = []


def tell(account: TraceAccount) -> None:
    """Say what became of a trace; the same trace at another rate or seed is not said again."""
    if tell_once(account.origin, str(account)):
        _accounts.append(account)


def accounts() -> list[TraceAccount]:
    """Of every trace that the run has told of, in order."""
    return list(_accounts)


def told(config: TraceConfig, trace: Trace) -> Trace:
    """A trace whose lengths alone are used: what became of it is told, and stands in its provenance."""
    account = account_of(config, trace)
    tell(account)
    return trace.noting(account=asdict(account))


def tell_once(key: str, line: str) -> bool:
    """Print a line, unless one of that key has been printed; says whether it was."""
    if key in _told:
        return False
    _told.add(key)
    print(line, file=sys.stderr, flush=True)
    return True


def forget() -> None:
    """Begin anew, as a run does."""
    _told.clear()
    _accounts.clear()
