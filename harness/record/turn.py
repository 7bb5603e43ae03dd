"""Turns: of two processes that would write the same, one waits for the other."""

import errno
import fcntl
import os
import platform
import sys
import weakref
from pathlib import Path

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.EBADF)


class Turn:
    """The right to write what `path` stands for: from construction, which may wait, until `end`.

    A record lock of POSIX: it goes with its process, however that dies, and no child inherits it. Within one process
    it excludes nobody. Raises OSError where the file cannot be made.
    """

    def __init__(self, path: Path, what: str) -> None:
        self._path = path
        while True:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._close = weakref.finalize(self, os.close, self._file)
            if not self._locked(what) or _names(path, self._file):
                break
            self._close()  # the holder before has ended, and taken the file away

    def _locked(self, what: str) -> bool:
        """Lock the file, waiting where another has it. False where the file system knows no locks, which is said."""
        try:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                holder = os.pread(self._file, 200, 0).decode(errors="replace") or "another process"
                print(f"waiting for {holder}, which writes the same {what}", file=sys.stderr, flush=True)
                fcntl.lockf(self._file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            print(
                f"{self._path.parent}: the file system has no locks ({os.strerror(error.errno)}), so nothing keeps a "
                "second command from writing the same: run one at a time",
                file=sys.stderr,
            )
            return False
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        return True

    def end(self) -> None:
        """Let the next one begin."""
        if self._close.alive:
            self._path.unlink(missing_ok=True)
            self._close()


def _names(path: Path, file: int) -> bool:
    """Whether the path still names the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False
