"""How our numba functions are compiled, and where the machine code is kept.

Numba keys its cache by the file a function stands in, and misses an edit of any other file that was compiled into
it. Ours is keyed by the text of every module that has to do with numba. It lies beside the source, or where that is
read-only in the user's cache folder, else among temporary files; `NUMBA_CACHE_DIR` overrides it. Where nothing can be
written each process compiles for itself, and says so.
"""

import hashlib
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np

from kvarena.caches import can_write, own_folder, shared_folder

Function = TypeVar("Function", bound=Callable[..., Any])
Array = np.ndarray[Any, Any]

# nogil: another thread maps page-groups meanwhile.
_OPTIONS: dict[str, Any] = {"nogil": True, "boundscheck": False, "error_model": "numpy"}
_JITTED = re.compile(rb"^(from|import) (numba|llvmlite|kvarena\.kernels\.jit)", re.MULTILINE)
_PACKAGE = Path(__file__).resolve().parent


@cache
def cache_folder() -> Path | None:
    """Folder of the machine code of this version of the package; None where none can be written."""
    settings: Any = numba.config
    if chosen := settings.CACHE_DIR:  # NUMBA_CACHE_DIR
        if can_write(Path(chosen)):
            return Path(chosen)
        _say(f"NUMBA_CACHE_DIR={chosen} cannot be written, and numba's machine code is kept elsewhere")
    digest = hashlib.sha256()
    for source in sorted(_PACKAGE.glob("*.py")):
        text = source.read_bytes()
        if _JITTED.search(text):
            digest.update(text)
    name = f"numba-{digest.hexdigest()[:16]}"
    own = own_folder()
    for parent in (_PACKAGE / "__pycache__", own and own / "kvarena", shared_folder()):
        if parent is not None and can_write(parent / name):
            return parent / name
    _say("numba's machine code is not kept, and each run compiles anew: no folder can be written")
    return None


def jit(function: Function, *, parallel: bool = False, fastmath: bool = False) -> Function:
    """Compile with numba: cached, no bounds checks, and *strict* floating point unless `fastmath`.

    Strict, because the order of every sum is part of the contract: the same bits for every layout, batch and
    number of threads. What is fast here is written out in vectors (`simd.py`), not left to reassociation.
    """
    settings: Any = numba.config
    chosen = settings.CACHE_DIR
    folder = cache_folder()
    options = _OPTIONS | {"parallel": parallel, "fastmath": fastmath}
    if folder is None:
        return cast(Function, numba.njit(function, **options))
    # Numba's key does not tell serial code from parallel code of one function: a folder each.
    settings.CACHE_DIR = str(folder / ("parallel" if parallel else "serial"))
    try:
        compiled = numba.njit(function, cache=True, **options)
    finally:
        settings.CACHE_DIR = chosen
    _keep_if_there_is_room(compiled)
    return cast(Function, compiled)


def _keep_if_there_is_room(compiled: Any) -> None:
    """Let machine code that cannot be written be used all the same: a full disk or quota is none of its business."""
    save = compiled._cache.save_overload

    def save_or_say(signature: object, data: object) -> None:
        try:
            save(signature, data)
        except OSError as error:
            _say(f"numba's machine code is not kept, and each run compiles anew: {error}")

    compiled._cache.save_overload = save_or_say


@cache
def _say(what: str) -> None:
    print(what, file=sys.stderr)
