"""Writing results: whole or not at all, and in words where the file system refuses."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvarena.errors import UserError

_REASONS = {
    errno.ENOSPC: "no space is left there",
    errno.EDQUOT: "the quota there is used up",
    errno.EFBIG: "a file would be larger than is allowed (ulimit -f)",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "writing there is not permitted",
    errno.EPERM: "writing there is not permitted",
    errno.ENOENT: "no such folder can be made",
    errno.ENOTDIR: "a file is in the way",
    errno.EEXIST: "something is in the way",
}


@contextmanager
def explained(path: Path, advice: str) -> Iterator[None]:
    """Turn what a file system refuses into a UserError: where, why, and the advice."""
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
        raise UserError(f"cannot write results to {path}: {reason}. Nothing half-written is left. {advice}") from error


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield a folder beside `target` that takes its name at the end, or vanishes where anything fails.

    Raises FileExistsError where another process has written the target meanwhile.
    """
    partial = beside(target)
    partial.mkdir()
    try:
        yield partial
        partial.rename(target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if error.errno == errno.ENOTEMPTY:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
        raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_whole(target: Path, content: str | bytes) -> None:
    """Write a file, or replace it: a reader finds the old one or the new, never a part. Raises OSError."""
    partial = beside(target)
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def beside(target: Path) -> Path:
    """A hidden name beside `target` that nothing has, and no other process thinks of."""
    return target.with_name(f".{target.name[:40]}-{secrets.token_hex(6)}")
