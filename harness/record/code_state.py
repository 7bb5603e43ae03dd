"""Which code runs: the commit, and what of it is uncommitted.

Code is what a run may read of the project itself: CODE, with the published values that decide what a number is called.
Whatever else lies in the checkout (results, notebooks, data of one's own) is not, and is never opened.
"""

import hashlib
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from kvarena.harness.paths import ROOT

CODE = ("allocators", "conf", "experiments", "harness", "kernels", "kvarena", "results/published")
LARGEST = 1 << 24  # bytes; no code is larger, so a larger file counts by its name, size and time of change
_OF_GIT = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")  # a hook has those of its own repository


@cache
def git_state() -> dict[str, Any]:
    """Commit, whether the code is dirty, and a hash of what is uncommitted.

    Where git tells nothing (no history, another owner, no git) the commit is what KVARENA_COMMIT says, whether the copy
    was changed is not known (None), and all code counts as uncommitted: two states of it are never taken for one.
    """
    try:
        _git("ls-files", "--error-unmatch", "--", "run.sh")  # else the repository around is not of this project
        commit = os.fsdecode(_git("rev-parse", "HEAD")).strip()
        changed = _uncommitted()
    except (OSError, subprocess.SubprocessError) as error:
        named = os.environ.get("KVARENA_COMMIT") or None
        if named is None:
            _say_unknown(error)
        return {"commit": named, "dirty": None, "diff_sha256": _hash_of(_all_code())}
    return {"commit": commit, "dirty": bool(changed), "diff_sha256": _hash_of(changed) if changed else None}


def _uncommitted() -> list[Path]:
    """Files of the code that are changed, gone or new."""
    told = _git("status", "--porcelain", "-z", "--no-renames", "--untracked-files=all", "--", *CODE)
    return [ROOT / os.fsdecode(entry[3:]) for entry in told.split(b"\0") if entry]


def _all_code() -> Iterator[Path]:
    for folder in CODE:
        for parent, folders, names in os.walk(ROOT / folder):
            folders[:] = [name for name in folders if name != "__pycache__"]
            yield from (Path(parent, name) for name in names)


def _git(*arguments: str) -> bytes:
    """What git says. Raises OSError or SubprocessError where it does not."""
    around = {name: value for name, value in os.environ.items() if name not in _OF_GIT}
    command = ("git", "--no-optional-locks", *arguments)
    return subprocess.run(command, cwd=ROOT, env=around, capture_output=True, check=True, timeout=30).stdout


def _say_unknown(error: Exception) -> None:
    """Say why no commit is known, and who may name it."""
    said = error.stderr.decode(errors="replace") if isinstance(error, subprocess.CalledProcessError) else str(error)
    why = (said.strip() or type(error).__name__).splitlines()[0]
    print(f"commit: null in this run's provenance ({why}); KVARENA_COMMIT=HASH names it", file=sys.stderr, flush=True)


def _hash_of(files: Iterator[Path] | list[Path]) -> str:
    """Of names and contents, in the order of names."""
    whole = hashlib.sha256()
    for path in sorted(files):
        whole.update(os.fsencode(path.relative_to(ROOT)) + b"\0" + _content(path) + b"\0")
    return whole.hexdigest()


def _content(path: Path) -> bytes:
    """The hash of a file; of whatever is none, cannot be read or is too large to be code, what is known of it."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            return f"mode {found.st_mode:o}".encode()
        if found.st_size > LARGEST:
            return f"{found.st_size} bytes of {found.st_mtime_ns}".encode()
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        return f"error {error.errno}".encode()
