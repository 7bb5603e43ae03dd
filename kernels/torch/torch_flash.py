"""The `torch_flash` kernel: the FlashAttention 2 that is built into torch; nothing else is needed.

`scaled_dot_product_attention` knows no lengths, but the operator beneath it does (and beneath
`torch.nn.attention.varlen`): it takes keys packed one sequence after another, with the start of each and how many of
them to use. The starts may lie anywhere, so rows of a cache can be shown to it as one long sequence of tokens, as
long as a row's stride is a whole number of tokens. Block tables came with torch 2.13, for blocks of 256 tokens.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvarena.errors import UserError
from kvarena.kernels.kernel import AttentionKernel
from kvarena.kernels.layout import Layout
from kvarena.kernels.spec import CUDA, HALF, KernelSpec
from kvarena.kernels.view import BatchView, LayerCache

_forward = torch.ops.aten._flash_attention_forward


class TorchFlashAttention(AttentionKernel):
    """Both layouts. Splits of blocks have left rows unwritten in torch 2.13: one split there, `num_splits`."""

    spec = KernelSpec(
        name="torch_flash",
        body="FlashAttention 2",
        library="torch",
        layouts=frozenset(Layout),
        devices=CUDA,
        dtypes=HALF,
        head_sizes=frozenset(range(8, 257, 8)),
        block_sizes=frozenset({256}),
        block_operator="_flash_attention_forward",
        in_graph=True,
    )
    num_splits = 1

    def decode(self, q: Tensor, cache: LayerCache, view: BatchView, out: Tensor) -> None:
        """Attend with one query per sequence."""
        self._attend(q, cache, view, out)

    def prefill(self, q: Tensor, cache: LayerCache, view: BatchView, out: Tensor) -> None:
        """Attend causally with packed queries."""
        self._attend(q, cache, view, out)

    def _attend(self, q: Tensor, cache: LayerCache, view: BatchView, out: Tensor) -> None:
        where: dict[str, Any] = {}
        if view.block_table is not None:
            k, v, starts = cache.k, cache.v, torch.zeros_like(view.query_starts)  # not looked at
            pages = -(-view.max_length // cache.block_size)
            where = {"block_table": view.block_table[:, :pages], "num_splits": self.num_splits}
        else:
            assert view.rows is not None, "a view has rows or a block table"
            k, v = one_sequence(cache.k), one_sequence(cache.v)
            starts = pad(view.rows.to(torch.int32) * (cache.k.stride(0) // cache.k.stride(1)), (0, 1))
        result = _forward(
            q,
            k,
            v,
            view.query_starts,
            starts,
            view.max_queries,
            view.max_length,
            0.0,
            True,
            False,
            scale=1 / math.sqrt(cache.head_size),
            seqused_k=view.lengths,
            **where,
        )
        out.copy_(result[0])


def one_sequence(rows: Tensor) -> Tensor:
    """Show rows [R, S, H, D] as one sequence [tokens, H, D]; row r starts at token r * stride(0) / stride(1).

    Raises UserError where a row's stride is no whole number of tokens, or tokens are too many for 32 bits.
    """
    per_row, rest = divmod(rows.stride(0), rows.stride(1))
    tokens = (rows.shape[0] - 1) * per_row + rows.shape[1]
    if rest:
        raise UserError(
            f"kernel=torch_flash: a row's stride ({rows.stride(0)} elements) must be a multiple of a token's "
            f"({rows.stride(1)}): choose page-groups that hold whole tokens, or another kernel"
        )
    if tokens >= 2**31:
        raise UserError(
            f"kernel=torch_flash: counts tokens in 32 bits; these rows span {tokens}. Use fewer or shorter rows"
        )
    return rows.as_strided((tokens, *rows.shape[2:]), rows.stride()[1:])
