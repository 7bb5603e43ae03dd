"""The `triton` kernel: our own, for both layouts, through one body (`triton_body.py`)."""

import math

import torch
from torch import Tensor

from kvarena.errors import UserError
from kvarena.kernels.catalogue import TRITON
from kvarena.kernels.kernel import AttentionKernel
from kvarena.kernels.triton_body import attend, merge_splits
from kvarena.kernels.triton_launch import (
    DECODE_PROGRAMS,
    MOST_SPLIT_TOKENS,
    PREFILL_PROGRAMS,
    Tiles,
    multiprocessors,
    split_tokens,
    tiles,
)
from kvarena.kernels.view import BatchView, LayerCache

_LOG2_E = math.log2(math.e)


class TritonAttention(AttentionKernel):
    """One body for both layouts, on a CUDA GPU. Lengths must be at least 1.

    Nothing waits for the GPU, and a launch depends on shapes, `view.max_length` and `view.max_queries` alone, so a
    step can be captured in a CUDA graph: capture with `max_length` the longest context that the graph will see. A
    sequence that outgrows it is still read whole, in splits longer than intended.
    """

    spec = TRITON

    def __init__(self, shape: Tiles | None = None, split_tokens: int | None = None) -> None:
        """Chooses tiles and splits by call, unless a benchmark fixes them (`split_tokens`: a multiple of the tile)."""
        self._shape, self._split_tokens = shape, split_tokens
        self._workspaces: dict[tuple[torch.device, int], Tensor] = {}

    def decode(self, q: Tensor, cache: LayerCache, view: BatchView, out: Tensor) -> None:
        """Attend with one query per sequence."""
        self._attend(q, cache, view, out, DECODE_PROGRAMS, MOST_SPLIT_TOKENS)

    def prefill(self, q: Tensor, cache: LayerCache, view: BatchView, out: Tensor) -> None:
        """Attend causally with packed queries."""
        self._attend(q, cache, view, out, PREFILL_PROGRAMS, view.max_length)

    def _attend(
        self, q: Tensor, cache: LayerCache, view: BatchView, out: Tensor, per_multiprocessor: int, most: int
    ) -> None:
        q = q if q[0].is_contiguous() else q.contiguous()
        if not out[0].is_contiguous():
            raise UserError("kernel=triton: the heads of an output must lie densely")
        tokens, query_heads, size = q.shape
        heads = cache.num_kv_heads
        group = query_heads // heads
        paged = view.block_table is not None
        shape = self._shape or tiles(size, q.element_size(), view.max_queries * group, paged)
        row_tiles = -(-view.max_queries * group // shape.ROWS)
        programs = heads * row_tiles * view.batch_size
        wanted = per_multiprocessor * multiprocessors(q.device)
        per_split = self._split_tokens or split_tokens(programs, view.max_length, wanted, most, shape.TILE)
        splits = -(-view.max_length // per_split)
        parts, log_total = self._partials(splits, tokens * query_heads, size, q.device) if splits > 1 else (out, None)
        table = view.block_table if view.block_table is not None else view.rows
        assert table is not None, "a view has rows or a block table"
        attend[programs, splits](
            q,
            cache.k,
            cache.v,
            parts,
            log_total,
            view.lengths,
            view.query_starts,
            table,
            table.stride(0),
            *cache.k.stride()[:2],
            *cache.v.stride()[:2],
            q.stride(0),
            out.stride(0) if splits == 1 else query_heads * size,
            tokens * query_heads,
            row_tiles,
            per_split,
            _LOG2_E / math.sqrt(size),
            HEADS=heads,
            GROUP=group,
            SIZE=size,
            BLOCK_SIZE=0 if view.block_table is None else cache.block_size,
            **shape._asdict(),
        )
        if log_total is not None:
            merge_splits[tokens * query_heads,](
                parts, log_total, out, splits, tokens * query_heads, out.stride(0), QUERY_HEADS=query_heads, SIZE=size
            )

    def _partials(self, splits: int, query_heads: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Buffers for [splits, T, Hq, D] and [splits, T, Hq]; never freed, since a CUDA graph may hold on to them."""
        count = splits * query_heads
        capacity = 1 << (count - 1).bit_length()
        key = device, capacity * (size + 1)
        if key not in self._workspaces:
            self._workspaces[key] = torch.empty(key[1], dtype=torch.float32, device=device)
        workspace = self._workspaces[key]
        return workspace[: count * size], workspace[capacity * size :][:count]
