"""Whether a name is a file that can be read, and what stands there instead."""

import os
import stat
from pathlib import Path

from kvarena.errors import UserError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def local_file(name: str, key: str = "trace.path") -> Path | None:
    """The file of that name; None where nothing has it. Raises UserError for what stands there and cannot be read.

    key: what the user set it with.
    """
    try:
        path = Path(name).expanduser()
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        if path.is_symlink():
            raise UserError(f"{key}={name}: is a link to {path.readlink()}, where there is nothing") from error
        return None
    except (OSError, RuntimeError, ValueError) as error:  # no access, no such home, a NUL in the name
        raise UserError(f"{key}={name}: cannot be read: {error}") from error
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise UserError(f"{key}={name}: is {kind}, not a file (what is read here is read more than once)")
    if not os.access(path, os.R_OK):
        raise UserError(f"{key}={name}: cannot be read: you have no permission to")
    return path
