"""The `flash_attn` kernel: FlashAttention 2 from its own distribution, the one that the vAttention paper ran.

Its block tables take blocks of a multiple of 256 tokens.
"""

from importlib import import_module

from torch import Tensor

from kvarena.kernels.layout import Layout
from kvarena.kernels.libraries.flash_attention import FlashAttention2
from kvarena.kernels.spec import CUDA, HALF, KernelSpec


class FlashAttnAttention(FlashAttention2):
    """Both layouts, on GPUs of compute capability 8.0 and later."""

    spec = KernelSpec(
        name="flash_attn",
        body="FlashAttention 2",
        library="flash-attn",
        layouts=frozenset(Layout),
        devices=CUDA,
        dtypes=HALF,
        head_sizes=frozenset(range(8, 257, 8)),
        block_sizes=frozenset({256}),
        requires=("flash_attn",),
        install_hint="pip install flash-attn --no-build-isolation (compiles CUDA for an hour, or finds a wheel)",
        in_graph=True,
    )

    def __init__(self, num_splits: int = 0) -> None:
        super().__init__(num_splits)
        self._forward = import_module("flash_attn").flash_attn_with_kvcache

    def call(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Tensor,
        rows: Tensor | None,
        table: Tensor | None,
        out: Tensor,
    ) -> Tensor:
        """See FlashAttention2; the result is always a tensor of its own."""
        result: Tensor = self._forward(
            q,
            k,
            v,
            cache_seqlens=lengths,
            cache_batch_idx=rows,
            block_table=table,
            causal=True,
            num_splits=self.num_splits,
        )
        return result
