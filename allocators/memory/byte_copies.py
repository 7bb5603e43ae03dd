"""Copies inside a store's memory: runs of bytes, in every tensor alike, many in one call and none through a temporary.

    CPU    one compiled loop over memcpy (`memcpy.py`)
    GPU    one launch of a kernel that is given addresses (`triton_copies.py`), in the stream of the kernels

Blocks of paged memory, rows of reserved memory and page-groups are all such runs.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from kvarena.allocators.actions import Action, CopyRow

Ints = npt.NDArray[np.int64]


class Runs(NamedTuple):
    """Bytes of a tensor, by offsets from its start: int64 arrays, one element a run. No run overlaps its own target."""

    sources: Ints
    targets: Ints
    sizes: Ints

    @staticmethod
    def of_blocks(sources: Sequence[int], targets: Sequence[int], block_bytes: int) -> "Runs":
        """Copies of whole blocks, by number."""
        size = np.full(len(sources), block_bytes)
        return Runs(np.array(sources) * block_bytes, np.array(targets) * block_bytes, size)

    @staticmethod
    def of_rows(actions: Sequence[Action], row_bytes: int) -> "Runs":
        """Copies of parts of rows, which begin every `row_bytes`. Raises ValueError for any other action."""
        for action in actions:
            if not isinstance(action, CopyRow):
                raise ValueError(f"{type(action).__name__} is not a copy of a row")
        _, source, target, start, stop = np.array(actions, dtype=np.int64).T
        return Runs(source * row_bytes + start, target * row_bytes + start, stop - start)


class ByteCopies:
    """Copies in tensors that begin at `bases`. Whoever asks keeps the memory mapped, and the tensors alive."""

    def __init__(self, bases: Sequence[int], device: torch.device) -> None:
        if device.type == "cuda":
            from kvarena.allocators.memory.triton_copies import TritonCopies

            self._copy: Callable[[Runs], None] = TritonCopies(bases, device)
        else:
            self._copy = _HostCopies(bases)

    def __call__(self, runs: Runs) -> None:
        """Copy runs; the result is that of one after the other."""
        self._copy(runs)


class _HostCopies:
    def __init__(self, bases: Sequence[int]) -> None:
        self._bases = np.array(bases, dtype=np.int64)
        self._loop = _host_loop()

    def __call__(self, runs: Runs) -> None:
        self._loop(self._bases, runs.targets, runs.sources, runs.sizes)


@cache
def _host_loop() -> Callable[..., Any]:
    from kvarena.allocators.memory.memcpy import compiled_copies  # numba takes a second to import

    return compiled_copies()


def independent_runs(runs: Runs) -> Iterator[Runs]:
    """Split runs, in order, so that within a part nothing is read or written that an earlier run of it has written.

    Runs that begin elsewhere than a written one are taken to touch other bytes: they come from blocks or rows.
    """
    first, written = 0, set[int]()
    for i, (source, target) in enumerate(zip(runs.sources.tolist(), runs.targets.tolist(), strict=True)):
        if source in written or target in written:
            yield Runs(*(array[first:i] for array in runs))
            first, written = i, set()
        written.add(target)
    yield Runs(*(array[first:] for array in runs))
