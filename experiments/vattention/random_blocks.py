"""The published protocol of vAttention's Fig 3: a fixed number of blocks, and tables drawn from them with replacement.

The pool grows with the block, and a sequence may have a block twice. So the bytes that a call touches depend on the
block size: of 1024 blocks, 16 sequences of 16K tokens find 16 times as much room in blocks of 256 as in blocks of 16.
Where the smaller pool fits the last-level cache and the larger does not, that is what is measured.
"""

import math

import torch

from kvarena.experiments.kit.attention_time import TOLERANCE, Call
from kvarena.harness.model.config import ModelConfig
from kvarena.kernels.kernel import AttentionKernel
from kvarena.kernels.layout import Layout
from kvarena.kernels.reference import reference_attention
from kvarena.kernels.view import BatchView, LayerCache


class DrawnBlocks:
    """K/V of one layer in `num_blocks` blocks, and one batch of sequences of equal length over them."""

    def __init__(
        self, model: ModelConfig, batch: int, context: int, block_size: int, num_blocks: int, device: torch.device
    ) -> None:
        generator = torch.Generator().manual_seed(model.seed)
        dtype = getattr(torch, model.dtype)
        shape = (num_blocks, block_size, model.num_kv_heads, model.head_size)
        k, v = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
        self._cache = LayerCache(Layout.PAGED, k, v)
        needed = math.ceil(context / block_size)
        table = torch.randint(num_blocks, (batch, needed), generator=generator, dtype=torch.int32)
        self.distinct_bytes = len(set(table.flatten().tolist())) * 2 * k[0].numel() * k.element_size()
        self._q = torch.randn(batch, model.num_heads, model.head_size, generator=generator).to(k)
        self._view = BatchView(
            lengths=torch.full((batch,), context, dtype=torch.int32, device=device),
            query_starts=torch.arange(batch + 1, dtype=torch.int32, device=device),
            rows=None, block_table=table.to(device), max_length=context, max_queries=1,
        )  # fmt: skip
        self._tolerance = TOLERANCE[model.dtype]

    def calls(self, kernel: AttentionKernel) -> list[Call]:
        """The one call there is, checked against float64. Raises RuntimeError."""
        out = torch.empty_like(self._q)
        kernel.decode(self._q, self._cache, self._view, out)
        expected = reference_attention(self._q, self._cache, self._view)
        gap = float((out.double().cpu() - expected).abs().max() / expected.abs().max())
        if not gap <= self._tolerance:
            raise RuntimeError(f"{kernel.spec.name} on drawn blocks: off by {gap:.2e} of the largest output")
        return [lambda: kernel.decode(self._q, self._cache, self._view, out)]
