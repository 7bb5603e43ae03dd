"""Loops over the C library as machine code: many calls made as one, which holds no interpreter lock."""

from collections.abc import Callable
from typing import Any

import numba


def compiled(signature: str, loop: Callable[..., Any]) -> Callable[..., Any]:
    """`loop` compiled for arguments of this signature, from numba's cache where there is a folder to keep it."""
    for cache in (True, False):
        try:
            machine_code: Callable[..., Any] = numba.njit(signature, nogil=True, boundscheck=False, cache=cache)(loop)
            return machine_code
        except (RuntimeError, OSError):  # no folder can be written, or it is full
            if not cache:
                raise
    raise AssertionError
