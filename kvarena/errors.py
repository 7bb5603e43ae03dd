"""The one error a user can cause. It stands below every package and imports nothing of ours."""

from pathlib import Path
from traceback import extract_tb


class UserError(Exception):
    """A mistake the user can mend: the message says what was wrong, where, and what is allowed.

    The command line prints the message without a traceback and exits with status 2.
    """


def does_not_run(path: Path, error: Exception) -> UserError:
    """What to say of an allocator's or a kernel's file that cannot be read or imported: its line, and why."""
    path = path.resolve()
    if isinstance(error, SyntaxError):
        return UserError(f"{Path(error.filename or path).resolve()}:{error.lineno}: {error.msg}")
    lines = [str(each.lineno) for each in extract_tb(error.__traceback__) if Path(each.filename).resolve() == path]
    what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return UserError(f"{':'.join([str(path), *lines[-1:]])}: {what}")
