"""FlashAttention 2's entry for a KV cache, which two kernels share: `fa2` (vLLM's wheel) and `flash_attn`.

It takes the same number of queries of every sequence. So a decode is one call, and so is a prefill whose sequences
all bring as many; any other prefill is one call per sequence. Both layouts run its split-KV kernel, with an index of
rows or a block table: a "same library" pair whose bodies differ little.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from kvarena.kernels.kernel import AttentionKernel
from kvarena.kernels.view import BatchView, LayerCache


class FlashAttention2(AttentionKernel):
    """Both layouts; `num_splits` 0 leaves the number of splits to the library."""

    def __init__(self, num_splits: int = 0) -> None:
        self.num_splits = num_splits

    @abstractmethod
    def call(
        self,
        q: Tensor,  # [B, n, Hq, D]
        k: Tensor,  # as a cache's
        v: Tensor,
        lengths: Tensor,  # [B] int32
        rows: Tensor | None,  # [B] int32
        table: Tensor | None,  # [B, blocks] int32
        out: Tensor,  # [B, n, Hq, D]
    ) -> Tensor:
        """Attend causally, aligned to the end; the result may be `out` or a tensor of its own."""

    def decode(self, q: Tensor, cache: LayerCache, view: BatchView, out: Tensor) -> None:
        """Attend with one query per sequence."""
        self._attend(q, cache, view, out)

    def prefill(self, q: Tensor, cache: LayerCache, view: BatchView, out: Tensor) -> None:
        """Attend causally with packed queries."""
        if q.shape[0] == view.batch_size * view.max_queries:
            return self._attend(q, cache, view, out)
        starts = view.query_starts.tolist()
        for b in range(view.batch_size):
            run, one = slice(starts[b], starts[b + 1]), slice(b, b + 1)
            self._attend(q[run], cache, view, out[run], one)
        return None

    def _attend(self, q: Tensor, cache: LayerCache, view: BatchView, out: Tensor, some: slice = slice(None)) -> None:
        """Attend for sequences that bring as many queries each."""
        lengths = view.lengths[some]
        shape = len(lengths), -1, *q.shape[1:]
        # The library takes capacities, not lengths, for what it could have to read; hence the slices.
        k, v, rows, table = cache.k, cache.v, None, None
        if view.block_table is not None:
            table = view.block_table[some, : -(-view.max_length // cache.block_size)]
        else:
            assert view.rows is not None, "a view has rows or a block table"
            rows = view.rows[some].to(torch.int32)
            k, v = k[:, : view.max_length], v[:, : view.max_length]
        result = self.call(q.view(shape), k, v, lengths, rows, table, out.view(shape))
        if result.data_ptr() != out.data_ptr():
            out.copy_(result.view(out.shape))
