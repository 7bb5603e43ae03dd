"""The revision to compare with: which one, and a checkout of it."""

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvarena.errors import UserError
from kvarena.harness.paths import ROOT

_MAIN = ("main", "origin/main")


def base_revision(asked: str | None, root: Path = ROOT) -> str | None:
    """Commit of the base: the one asked for, else the merge base with main, else the parent. None: there is none.

    Raises UserError where the one asked for does not exist.
    """
    if asked is not None:
        commit = _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{asked}^{{commit}}")
        if commit is None:
            raise UserError(f"--base {asked}: no such revision in {root} (a shallow clone has only the last ones)")
        return commit
    head = _git(root, "rev-parse", "HEAD")
    for main in _MAIN:
        fork = _git(root, "merge-base", "HEAD", main)
        if fork is not None and fork != head:
            return fork
    return _git(root, "rev-parse", "--verify", "--quiet", "HEAD^")


@contextmanager
def checkout(commit: str, root: Path = ROOT) -> Iterator[Path]:
    """A worktree of a commit, in a temporary folder, until the block ends. Raises UserError where git makes none."""
    _git(root, "worktree", "prune")  # what a killed run left behind
    with tempfile.TemporaryDirectory(prefix="kvarena-base-") as folder:
        tree = Path(folder) / "tree"
        made = subprocess.run(
            ("git", "worktree", "add", "--detach", "--quiet", str(tree), commit),
            cwd=root, capture_output=True, text=True,
        )  # fmt: skip
        if made.returncode != 0:
            raise UserError(f"--base {commit}: git makes no worktree of it: {made.stderr.strip()}")
        try:
            yield tree
        finally:
            _git(root, "worktree", "remove", "--force", str(tree))


def subject(commit: str, root: Path = ROOT) -> str:
    """Short hash and first line of a commit."""
    return _git(root, "log", "-1", "--format=%h %s", commit) or commit


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(("git", *arguments), cwd=root, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
