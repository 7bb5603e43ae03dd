"""The CPU pool that blocks are swapped to.

    host   [S, 2 * layers, P, H, D]   a block's K and V of all layers lie together: one run of bytes
    pool   [2 * layers, N, P, H, D]

On a GPU the pool's side is gathered (scattered) on the device, a bounded batch at a time, and every block crosses in
one asynchronous copy from (to) pinned memory. All of it is in the stream of the kernels, which so wait for it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvarena.allocators.memory.staging import batches_of_blocks, indices_on


class SwapSpace:
    """Blocks on the host."""

    def __init__(self, num_blocks: int, pool: Tensor) -> None:
        """For blocks like those of `pool`. All of it is touched, and pinned where the pool is on a GPU."""
        shape = (num_blocks, pool.shape[0], *pool.shape[2:])
        self._pool = pool.transpose(0, 1)  # [N, 2 * layers, P, H, D]
        self._on_gpu = pool.device.type == "cuda"
        self._space = torch.zeros(shape, dtype=pool.dtype, pin_memory=self._on_gpu and num_blocks > 0)

    def swap_out(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy blocks of the pool to blocks of this space."""
        if not self._on_gpu:
            self._space[targets] = self._pool[sources]
            return
        for part in batches_of_blocks(self._pool, len(sources)):
            staged = self._pool.index_select(0, indices_on(self._pool.device, sources[part])).contiguous()
            for block, target in zip(staged, targets[part], strict=True):
                self._space[target].copy_(block, non_blocking=True)

    def swap_in(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy blocks of this space to blocks of the pool."""
        if not self._on_gpu:
            self._pool[targets] = self._space[sources]
            return
        for part in batches_of_blocks(self._pool, len(sources)):
            staged = self._pool.new_empty((len(sources[part]), *self._pool.shape[1:]))
            for block, source in zip(staged, sources[part], strict=True):
                block.copy_(self._space[source], non_blocking=True)
            self._pool.index_copy_(0, indices_on(self._pool.device, targets[part]), staged)
