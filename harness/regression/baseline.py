"""Committed baselines, and the change log that has to name them.

    results/baselines/<file>        what was accepted
    results/baselines/CHANGES.md    why: the newest entry of each file names its hash

A baseline that its newest entry does not name was changed without a reason, and nothing is judged against it. Two
branches that both accept a change conflict in the log, and the second to merge has to accept again.
"""

import hashlib
import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from kvarena.errors import UserError
from kvarena.harness.paths import RESULTS
from kvarena.harness.record.writing import write_whole

BASELINES = RESULTS / "baselines"
LOG = "CHANGES.md"
_HEADER = """\
# Baselines: what changed, and why

Newest first; written by `./run.sh regression --accept "reason"`. The newest entry of a file names the hash of what was
committed, so that no baseline changes without an entry. docs/regression.md says more.
"""
_ENTRY = re.compile(r"^## \S+ (?P<file>\S+) (?P<hash>[0-9a-f]{16})$", re.MULTILINE)
_RETIRED = re.compile(r"^Retired: `(?P<name>[^`]+)`", re.MULTILINE)
_LISTED = 20  # changes that an entry lists; the commit's diff has them all


class BaselineError(UserError):
    """A baseline that nothing can be judged against: absent, or changed without an entry."""


def fingerprint(text: str) -> str:
    """Hash of a baseline, whatever a checkout does to its line ends."""
    return hashlib.sha256("\n".join(text.splitlines()).encode()).hexdigest()[:16]


def read(name: str, folder: Path | None = None) -> str:
    """A committed baseline. Raises BaselineError where it is absent, or is not the one that the log names."""
    folder = folder or BASELINES
    path = folder / name
    if not path.is_file():
        raise BaselineError(f"there is no {folder.name}/{name}")
    text, found = path.read_text(encoding="utf-8"), _newest(_log(folder), name)
    if found != fingerprint(text):
        raise BaselineError(
            f"{folder.name}/{name} has hash {fingerprint(text)}, its newest entry in {LOG} names {found or 'none'}: "
            "a baseline changes together with the reason, --accept writes both"
        )
    return text


def accept(name: str, text: str, reason: str, changes: Sequence[str], folder: Path | None = None) -> None:
    """Write a baseline and the entry that explains it; nothing where the newest entry names it already.

    Raises UserError without a reason.
    """
    folder = folder or BASELINES
    if not reason.strip():
        raise UserError("--accept takes a reason: what was changed, and why its cost is right")
    if (folder / name).is_file() and _newest(_log(folder), name) == fingerprint(text):
        return
    folder.mkdir(parents=True, exist_ok=True)
    listed = [f"- {change}" for change in changes[:_LISTED]]
    if len(changes) > _LISTED:
        listed.append(f"- and {len(changes) - _LISTED} more, in this commit's diff")
    entry = [f"## {date.today()} {name} {fingerprint(text)}", "", reason.strip(), "", *listed]
    older = _log(folder).removeprefix(_HEADER).strip("\n")
    parts = [_HEADER.rstrip("\n"), "\n".join(entry).rstrip("\n"), *([older] if older else [])]
    write_whole(folder / name, text)
    write_whole(folder / LOG, "\n\n".join(parts) + "\n")


def retired(folder: Path | None = None) -> set[str]:
    """Timed benchmarks that the log says were dropped on purpose: lines "Retired: `name`, reason"."""
    return {match["name"] for match in _RETIRED.finditer(_log(folder or BASELINES))}


def _newest(log: str, name: str) -> str | None:
    """The hash in the newest entry of a file."""
    return next((match["hash"] for match in _ENTRY.finditer(log) if match["file"] == name), None)


def _log(folder: Path) -> str:
    path = folder / LOG
    return path.read_text(encoding="utf-8") if path.is_file() else ""
