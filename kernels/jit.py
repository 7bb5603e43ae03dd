"""How our numba functions are compiled, and where the machine code is kept.

Numba keys its cache by the file a function stands in, and misses an edit of any other file that was compiled into
it. Ours is keyed by the text of every module that has to do with numba. It lies beside the source, or where that is
read-only in the user's cache folder, else in a temporary one; `NUMBA_CACHE_DIR` overrides it.
"""

import hashlib
import re
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numba
import numpy as np

Function = TypeVar("Function", bound=Callable[..., Any])
Array = np.ndarray[Any, Any]

# nogil: another thread maps page-groups meanwhile.
_OPTIONS: dict[str, Any] = {"cache": True, "nogil": True, "boundscheck": False, "error_model": "numpy"}
_JITTED = re.compile(rb"^(from|import) (numba|llvmlite|kvarena\.kernels\.jit)", re.MULTILINE)
_PACKAGE = Path(__file__).resolve().parent


@cache
def cache_folder() -> Path:
    """Folder of the machine code of this version of the package."""
    digest = hashlib.sha256()
    for source in sorted(_PACKAGE.glob("*.py")):
        text = source.read_bytes()
        if _JITTED.search(text):
            digest.update(text)
    name = f"numba-{digest.hexdigest()[:16]}"
    for parent in (_PACKAGE / "__pycache__", Path.home() / ".cache" / "kvarena"):
        try:
            (parent / name).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=parent / name).close()
        except OSError:
            continue
        return parent / name
    return Path(tempfile.mkdtemp(prefix="kvarena-"))


def jit(function: Function, *, parallel: bool = False) -> Function:
    """Compile with numba: cached, no bounds checks, and *strict* floating point.

    Strict, because the order of every sum is part of the contract: the same bits for every layout, batch and
    number of threads. What is fast here is written out in vectors (`simd.py`), not left to reassociation.
    """
    settings: Any = numba.config
    chosen = settings.CACHE_DIR
    # Numba's key does not tell serial code from parallel code of one function: a folder each.
    settings.CACHE_DIR = str(Path(chosen or cache_folder()) / ("parallel" if parallel else "serial"))
    try:
        compiled: Any = numba.njit(function, parallel=parallel, **_OPTIONS)
    finally:
        settings.CACHE_DIR = chosen
    return compiled  # type: ignore[no-any-return]
