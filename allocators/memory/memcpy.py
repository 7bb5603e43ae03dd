"""Many copies in host memory as one call: a compiled loop over the C library's memcpy."""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from kvarena.allocators.vmm.compiled import compiled

Array = np.ndarray[Any, np.dtype[np.int64]]

# From about a megabyte on the library's memcpy writes past the caches, which took a quarter longer on an AMD EPYC.
_PIECE_BYTES = 32 * 1024

Loop = Callable[[Array, Array, Array, Array], None]

_POINTER, _SIZE, _BOOL = ir.IntType(8).as_pointer(), ir.IntType(64), ir.IntType(1)


@intrinsic
def _memcpy(typing: Any, target: Any, source: Any, size: Any) -> Any:
    """LLVM's memcpy, which becomes the library's: addresses and size are int64, and ranges may not overlap."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, source, size = arguments
        kind = ir.FunctionType(ir.VoidType(), [_POINTER, _POINTER, _SIZE, _BOOL])
        name = "llvm.memcpy.p0i8.p0i8.i64"
        function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        pointers = [builder.inttoptr(address, _POINTER) for address in (target, source)]
        builder.call(function, [*pointers, size, ir.Constant(_BOOL, 0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


def copy_runs(bases: Array, targets: Array, sources: Array, sizes: Array) -> None:
    """Copy sizes[i] bytes from base + sources[i] to base + targets[i], for every i in order, in every tensor."""
    for i in range(len(sizes)):
        for base in bases:
            for done in range(0, sizes[i], _PIECE_BYTES):
                target, source = base + targets[i] + done, base + sources[i] + done
                _memcpy(target, source, min(_PIECE_BYTES, sizes[i] - done))  # type: ignore[call-arg]  # no `typing`


def compiled_copies() -> Loop:
    """`copy_runs` as machine code."""
    return compiled("void(int64[::1], int64[::1], int64[::1], int64[::1])", copy_runs)
