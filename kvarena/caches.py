"""Where libraries keep what they compile and fetch, also for a user who has no cache folder that can be written.

Such is anyone with another's checkout and no home: a user of a container, a job of a cluster. Numba, matplotlib, Triton
and Hugging Face's libraries each look below the home, and each fails in its own way.
"""

import os
import stat
import sys
import tempfile
from pathlib import Path

from kvarena.errors import UserError

# Those that keep to XDG_CACHE_HOME need no more; these do not, or not with everything.
_OTHERS = ("MPLCONFIGDIR", "TRITON_HOME", "FLASHINFER_WORKSPACE_BASE")


def settle() -> None:
    """Before any library is imported: point all of them to one folder of ours where the user's own cannot be written.

    Raises UserError where nothing at all can.
    """
    mask = os.umask(0o077)
    os.umask(mask & 0o077)  # what we write we read again
    own = own_folder()
    if own is not None and can_write(own):
        return
    ours = shared_folder()
    if ours is None:
        raise UserError(
            f"no folder can be written for caches: not {own or 'one below the home, which is none'}, and no temporary "
            "one. TMPDIR names a folder for temporary files, XDG_CACHE_HOME one for caches"
        )
    print(f"{own or 'a home for caches'} cannot be written: libraries keep their caches in {ours}", file=sys.stderr)
    os.environ["XDG_CACHE_HOME"] = str(ours)
    for name in _OTHERS:
        os.environ.setdefault(name, str(ours))


def own_folder() -> Path | None:
    """The user's own cache folder, as the desktop's standard has it; None for a user without a home."""
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen)
    try:
        return Path.home() / ".cache"
    except RuntimeError:  # HOME is not set, and the system does not know this user
        return None


def shared_folder() -> Path | None:
    """A folder of this user's among the temporary files, the same each time; None where there can be none."""
    try:
        folder = Path(tempfile.gettempdir(), f"kvarena-{os.getuid()}")
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    # Machine code is loaded from here: anybody could have made a folder, or a link, of this name.
    trusted = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    return folder if trusted and can_write(folder) else None


def can_write(folder: Path) -> bool:
    """Whether files can be written there, now; the folder is made where it can be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
    except OSError:
        return False
    return True
