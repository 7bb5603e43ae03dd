"""Copies inside a store's memory: runs of bytes, in every tensor alike, many in one call and none through a temporary.

    CPU    one compiled loop over memcpy (`memcpy.py`)
    GPU    one launch of a kernel that is given addresses (`triton_copies.py`), in the stream of the kernels

Blocks of paged memory, rows of reserved memory and page-groups are all such runs.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from kvarena.allocators.actions import Action, CopyRow


class Run(NamedTuple):
    """Bytes of a tensor, by offset from its start. Source and target do not overlap."""

    source: int
    target: int
    size: int


def row_run(action: Action, row_bytes: int) -> Run:
    """The run of a copied row, where rows begin every `row_bytes`. Raises ValueError for any other action."""
    if not isinstance(action, CopyRow):
        raise ValueError(f"{type(action).__name__} is not a copy of a row")
    source, target = (row * row_bytes + action.start for row in (action.source, action.target))
    return Run(source, target, action.stop - action.start)


class ByteCopies:
    """Copies in tensors that begin at `bases`. Whoever asks keeps the memory mapped, and the tensors alive."""

    def __init__(self, bases: Sequence[int], device: torch.device) -> None:
        if device.type == "cuda":
            from kvarena.allocators.triton_copies import TritonCopies

            self._copy: Callable[[Sequence[Run]], None] = TritonCopies(bases, device)
        else:
            self._copy = _HostCopies(bases)

    def __call__(self, runs: Sequence[Run]) -> None:
        """Copy runs; the result is that of one after the other."""
        for independent in independent_runs(runs):
            self._copy(independent)


class _HostCopies:
    def __init__(self, bases: Sequence[int]) -> None:
        self._bases = np.array(bases, dtype=np.int64)
        self._loop = _host_loop()

    def __call__(self, runs: Sequence[Run]) -> None:
        sources, targets, sizes = np.array(runs, dtype=np.int64).T.copy()
        self._loop(self._bases, targets, sources, sizes)


@cache
def _host_loop() -> Callable[..., Any]:
    from kvarena.allocators.memcpy import compiled_copies  # numba takes a second to import

    return compiled_copies()


def independent_runs(runs: Sequence[Run]) -> Iterator[Sequence[Run]]:
    """Split runs, in order, so that within a part nothing is read or written that an earlier run of it has written.

    Runs that begin elsewhere than a written one are taken to touch other bytes: they come from blocks or rows.
    """
    first, written = 0, set[int]()
    for i, run in enumerate(runs):
        if run.source in written or run.target in written:
            yield runs[first:i]
            first, written = i, set()
        written.add(run.target)
    if first < len(runs):
        yield runs[first:]
