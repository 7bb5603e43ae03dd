"""The `flex` kernel: torch's FlexAttention over blocks, a paged kernel from the library.

FlexAttention sees all blocks of the cache as one long sequence of keys. Which of them a query may read is said by a
`BlockMask` whose KV blocks are the cache's blocks: those that every query of a call sees whole are listed as full,
those at the edge as partial, and a mask drops the tokens of a partial block that lie in a query's future.

What is masked still takes part, with weight zero: there must be no NaN or infinity past a sequence's length in its
last block. (Every other kernel here leaves it out.)

On a CPU torch 2.13 compiles it for fixed sizes only: with sizes left open, its C++ fails to compile as soon as a mask
looks something up. So a decode is padded to a multiple of 64 sequences (the padding has no blocks and costs nothing)
and a prefill runs in chunks of 128 queries; what is left to compile is one decode and one prefill per cache.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

from kvarena.kernels.kernel import AttentionKernel
from kvarena.kernels.layout import Layout
from kvarena.kernels.spec import CPU, KernelSpec
from kvarena.kernels.view import BatchView, LayerCache

SEQUENCES = 64  # a decode is padded to a multiple of this
QUERIES = 128  # of one call of a prefill
_NEVER = 2**31 - 1  # block of a sequence that no query reaches
_MAX_COMPILED = 64  # torch falls back to a slow path, silently, beyond its own limit of 8


class FlexAttention(AttentionKernel):
    """Paged. Compiles at the first decode and the first prefill of a cache, about 15 s each."""

    spec = KernelSpec(
        name="flex",
        body="torch flex_attention",
        library="torch",
        layouts=frozenset({Layout.PAGED}),
        devices=CPU,
        dtypes=frozenset({"float32", "bfloat16"}),
        needs_cxx=True,
        install_hint="install one (Debian: apt install g++) or set CXX",
    )

    def __init__(self, compiled: bool = True) -> None:
        self._attend: Any = flex_attention
        if compiled:
            torch._dynamo.config.recompile_limit = max(_MAX_COMPILED, torch._dynamo.config.recompile_limit)
            self._attend = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        self._last: tuple[BatchView, list[BlockMask]] | None = None  # the layers of a step share their masks

    def decode(self, q: Tensor, cache: LayerCache, view: BatchView, out: Tensor) -> None:
        """Attend with one query per sequence, all sequences in one call."""
        table, lengths = _table(cache, view), view.lengths.to(torch.int64)
        extra = -len(lengths) % SEQUENCES
        if self._last is None or self._last[0] is not view:
            rows = pad(table, (0, 0, 0, extra)), pad(lengths, (0, extra))
            self._last = view, [block_mask(cache, *rows, rows[1] - 1, queries=1)]
        queries = pad(q, (0, 0, 0, 0, 0, extra))[:, :, None]  # [64 n, Hq, 1, D]
        out.copy_(self._call(queries, cache, self._last[1][0])[: len(out), :, 0])

    def prefill(self, q: Tensor, cache: LayerCache, view: BatchView, out: Tensor) -> None:
        """Attend causally with packed queries, one call per chunk of a sequence's queries."""
        chunks = _chunks(view)
        if self._last is None or self._last[0] is not view:
            table = _table(cache, view)
            self._last = (
                view,
                [
                    block_mask(
                        cache,
                        table[b : b + 1],
                        torch.tensor([first + run.stop - run.start]),
                        torch.tensor([first]),
                        QUERIES,
                    )
                    for b, run, first in chunks
                ],
            )
        for (_, run, _), mask in zip(chunks, self._last[1], strict=True):
            n = run.stop - run.start
            queries = pad(q[run], (0, 0, 0, 0, 0, QUERIES - n)).transpose(0, 1)[None]  # [1, Hq, 128, D]
            out[run].copy_(self._call(queries, cache, mask)[0, :, :n].transpose(0, 1))

    def _call(self, q: Tensor, cache: LayerCache, mask: BlockMask) -> Tensor:
        k, v = (x.view(1, -1, *x.shape[2:]).transpose(1, 2) for x in (cache.k, cache.v))  # [1, H, N * P, D]
        attended: Tensor = self._attend(q, k, v, block_mask=mask, enable_gqa=True)
        return attended


def _chunks(view: BatchView) -> list[tuple[int, slice, int]]:
    """Chunks of at most 128 queries: their sequence, their place in the packed batch, the position of the first."""
    starts, lengths = view.query_starts.tolist(), view.lengths.tolist()
    return [
        (b, slice(at, min(at + QUERIES, starts[b + 1])), lengths[b] - (starts[b + 1] - at))
        for b in range(view.batch_size)
        for at in range(starts[b], starts[b + 1], QUERIES)
    ]


def _table(cache: LayerCache, view: BatchView) -> Tensor:
    """Block tables as wide as the cache has blocks, which is what FlexAttention asks for: [B, N]."""
    assert view.block_table is not None, "flex reads the paged layout"
    blocks = cache.k.shape[0]
    table = view.block_table[:, :blocks].to(torch.int64).clamp(0, blocks - 1)  # entries past the length: anything
    return pad(table, (0, blocks - table.shape[1]))


def block_mask(cache: LayerCache, table: Tensor, lengths: Tensor, first: Tensor, queries: int) -> BlockMask:
    """Say what the queries at positions first, first + 1, .. see of sequences [B] whose blocks are `table` [B, N]."""
    blocks, size = cache.k.shape[:2]
    ordinal = torch.arange(blocks, device=table.device)
    used = ordinal * size < lengths[:, None]
    place = torch.full_like(table, _NEVER)  # [B, N]: block of the cache -> of the sequence
    place.scatter_reduce_(1, table, torch.where(used, ordinal, _NEVER), "amin")

    def causal(b: Tensor, _h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return place[b, kv // size] * size + kv % size <= first[b] + q

    full = (first + 1) // size  # [B]: blocks seen whole by the first query, and so by all
    seen = -(-lengths // size)
    edge = table.gather(1, (full[:, None] + ordinal).clamp(max=blocks - 1))  # partial blocks follow the full ones
    num_edge, edge, num_full, whole = (x.to(torch.int32)[:, None, None] for x in (seen - full, edge, full, table))
    return BlockMask.from_kv_blocks(
        num_edge,
        edge,
        num_full,
        whole,
        BLOCK_SIZE=(QUERIES, size),
        mask_mod=causal,
        seq_lengths=(queries, blocks * size),
        compute_q_blocks=False,  # only a backward pass reads them
    )
