"""Many mmaps as one call: a compiled loop that holds no interpreter lock.

A thread that maps through the interpreter, call by call, lets go of its lock and takes it back every few
microseconds. Beside a forward pass, which does the same around every operator, each take may have to wait: what was
hidden comes back as lost turns.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import types

from kvarena.allocators.vmm.compiled import compiled

Array = np.ndarray[Any, np.dtype[np.int64]]
Loop = Callable[[Array, int, int, int], int]

_mmap: Any = types.ExternalFunction(
    "mmap", types.int64(types.int64, types.uint64, types.int32, types.int32, types.int32, types.int64)
)
_errno_location: Any = types.ExternalFunction("__errno_location", types.CPointer(types.int32)())  # type: ignore[no-untyped-call]


def map_runs(runs: Array, protection: int, flags: int, fd: int) -> int:
    """mmap every row (address, bytes, offset) of `runs`, up to the first that fails: returns its errno, else 0."""
    for i in range(len(runs)):
        if _mmap(runs[i, 0], runs[i, 1], protection, flags, fd, runs[i, 2]) == -1:  # MAP_FAILED
            return int(_errno_location()[0])
    return 0


@cache
def mmap_loop() -> Loop:
    """`map_runs` as machine code."""
    return compiled("int32(int64[:, ::1], int32, int32, int32)", map_runs)
