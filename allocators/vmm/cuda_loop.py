"""Many cuMemMaps as one call: a compiled loop that holds no interpreter lock (`mmap_loop.py` says why).

It calls the driver's library itself, as the bindings do; whoever calls has the context current in its thread.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite.binding import load_library_permanently  # type: ignore[import-untyped]
from numba import types

from kvarena.allocators.vmm.compiled import compiled
from kvarena.allocators.vmm.mmap_loop import Array

Loop = Callable[[Array, Array, int, int], int]

_map: Any = types.ExternalFunction(
    "cuMemMap", types.int32(types.uint64, types.uint64, types.uint64, types.uint64, types.uint64)
)
_set_access: Any = types.ExternalFunction(
    "cuMemSetAccess", types.int32(types.uint64, types.uint64, types.uint64, types.uint64)
)


def map_page_groups(groups: Array, done: Array, group_bytes: int, access: int) -> int:
    """Map every row (address, the driver's handle, bytes of the run that ends here or 0), giving access run by run.

    Up to the first call that fails, whose result it returns, else 0. `done`: calls of either kind, that one among them.
    """
    for i in range(len(groups)):
        done[0] += 1
        result = _map(groups[i, 0], group_bytes, 0, groups[i, 1], 0)
        if result == 0 and groups[i, 2]:
            done[1] += 1
            result = _set_access(groups[i, 0] + group_bytes - groups[i, 2], groups[i, 2], access, 1)
        if result != 0:
            return int(result)
    return 0


@cache
def cuda_loop() -> Loop:
    """`map_page_groups` as machine code. Raises ModuleNotFoundError without numba, RuntimeError without a driver."""
    load_library_permanently("libcuda.so.1")
    return compiled("int32(int64[:, ::1], int64[::1], int64, int64)", map_page_groups)


def rows(addresses: list[int], handles: list[int], run_ends: list[int]) -> Array:
    """What the loop takes."""
    return np.array([addresses, handles, run_ends], dtype=np.int64).T.copy()
