"""What files hold, told by hash: not by their names, nor by when they were written."""

import hashlib
import time
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

from kvarena.errors import UserError
from kvarena.harness.files.local_file import local_file

REVISION = "revision "  # in place of a hash: what the hub calls the content of a name
_SETTLED_NS = 2_000_000_000  # a file older than the coarsest clock of a file system does not change unseen


def hashes(paths: Iterable[str | None], key: str = "trace.path") -> dict[str, str]:
    """The hash of the content of each of these files, by path; names that nothing has are left out.

    key: what the user set them with. Raises UserError for what cannot be read.
    """
    files = {path: local_file(path, key) for path in paths if path is not None}
    return {path: sha256(file) for path, file in files.items() if file is not None}


def sha256(path: Path) -> str:
    """The hash of what a file holds; one that has not changed is hashed once. Raises UserError where reading fails."""
    stat = path.stat()
    if time.time_ns() - stat.st_ctime_ns < _SETTLED_NS:
        return _digest(path)
    return _sha256(path.resolve(), (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))


def check_unchanged(files: Mapping[str, str]) -> None:
    """Raises UserError for a file that no longer holds what it did. files: hashes by path; other names are passed over.

    What was measured since belongs to neither content.
    """
    for path, before in files.items():
        if not before.startswith(REVISION) and hashes([path], "file").get(path) != before:
            raise UserError(
                f"{path}: was changed, or taken away, while this run read it. What was being measured is not kept; the "
                "same command runs with what the file holds then. Let the files of a run be until it has ended"
            )


@lru_cache(maxsize=1024)
def _sha256(path: Path, stamp: tuple[int, ...]) -> str:
    return _digest(path)


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:  # a disk that fails, a server that has gone
        raise UserError(f"{path}: cannot be read: {error}") from error
