"""Writing results: whole or not at all, and in words where the file system refuses."""

import errno
import shutil
import tempfile
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
}


@contextmanager
def explained(path: Path, advice: str) -> Iterator[None]:
    """Turn what a file system refuses into a UserError: where, why, and the advice."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REASONS:
            raise
        raise UserError(
            f"cannot write results to {path}: {_REASONS[error.errno]}. Nothing half-written is left. {advice}"
        ) from error


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield a folder beside `target` that takes its name at the end, or vanishes where anything fails."""
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield partial
        partial.chmod(0o755)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_whole(target: Path, content: str | bytes) -> None:
    """Write a file, or replace it: a reader finds the old one or the new, never a part. Raises OSError."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
