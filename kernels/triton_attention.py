"""The `triton` kernel: our own, for both layouts, through one body (`triton_body.py`)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kvarena.errors import UserError
from kvarena.kernels.kernel import AttentionKernel
from kvarena.kernels.layout import Layout
from kvarena.kernels.spec import ANY_DTYPE, CUDA, KernelSpec
from kvarena.kernels.triton_body import attend, merge_splits
from kvarena.kernels.triton_launch import Cut, Tiles, Work, alignment, cut_decode, cut_prefill, multiprocessors, tiles
from kvarena.kernels.view import BatchView, LayerCache

_LOG2_E = math.log2(math.e)


class TritonAttention(AttentionKernel):
    """One body for both layouts, on a CUDA GPU. Lengths must be at least 1.

    Nothing waits for the GPU, and a launch depends on shapes, `view.max_length` and `view.max_queries` alone, so a
    step can be captured in a CUDA graph: capture with `max_length` the longest context that the graph will see. A
    sequence that outgrows it is still read whole, in splits longer than intended.
    """

    spec = KernelSpec(
        name="triton",
        body="triton",
        library="kvarena",
        layouts=frozenset(Layout),
        devices=CUDA,
        dtypes=ANY_DTYPE,
        head_sizes=frozenset({16, 32, 64, 128, 256}),
        block_sizes=frozenset({1, 2, 4, 8, 16, 32, 64, 128, 256}),
        requires=("triton",),
        install_hint="torch's CUDA build brings it",
        in_graph=True,
    )

    def __init__(self, shape: Tiles | None = None, split_tokens: int | None = None) -> None:
        """Chooses tiles and splits by call, unless a benchmark fixes them (`split_tokens`: a multiple of the tile)."""
        self._shape, self._split_tokens = shape, split_tokens
        self._workspaces: dict[tuple[torch.device, int], Tensor] = {}

    def decode(self, q: Tensor, cache: LayerCache, view: BatchView, out: Tensor) -> None:
        """Attend with one query per sequence."""
        self._attend(q, cache, view, out, cut_decode)

    def prefill(self, q: Tensor, cache: LayerCache, view: BatchView, out: Tensor) -> None:
        """Attend causally with packed queries."""
        self._attend(q, cache, view, out, cut_prefill)

    def _attend(
        self, q: Tensor, cache: LayerCache, view: BatchView, out: Tensor, choose: Callable[[Work, Tiles, int], Cut]
    ) -> None:
        tokens, query_heads, size = q.shape
        if out.stride()[1:] != (size, 1):
            raise UserError(f"kernel=triton: the heads of an output must lie densely; its strides are {out.stride()}")
        if q.stride()[1:] != (size, 1):
            q = q.contiguous()
        group = query_heads // cache.num_kv_heads
        work = Work(view.batch_size, cache.num_kv_heads, view.max_queries * group, view.max_length)
        shape = self._shape or tiles(size, q.element_size(), work.rows)
        if view.block_table is not None:
            shape = shape.over_blocks()
        cut = choose(work, shape, multiprocessors(q.device))
        if self._split_tokens is not None:
            cut = cut._replace(splits=-(-view.max_length // self._split_tokens), split_tokens=self._split_tokens)
        if cut.splits == 1:
            _launch(q, cache, view, out, None, shape, cut)
        else:
            parts, log_total = self._partials(cut.splits, tokens, query_heads, size, q.device)
            _launch(q, cache, view, parts[0], log_total, shape, cut)
            _merge(parts, log_total, out)

    def _partials(
        self, splits: int, tokens: int, query_heads: int, size: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Buffers [splits, T, Hq, D] and [splits, T, Hq]; never freed, since a CUDA graph may hold on to them."""
        count = splits * tokens * query_heads
        capacity = 1 << (count - 1).bit_length()
        key = device, capacity * (size + 1)
        if key not in self._workspaces:
            self._workspaces[key] = torch.empty(key[1], dtype=torch.float32, device=device)
        parts, logs = self._workspaces[key].split_with_sizes((capacity * size, capacity))
        shape = splits, tokens, query_heads
        return parts[: count * size].view(*shape, size), logs[:count].view(shape)


def _launch(
    q: Tensor, cache: LayerCache, view: BatchView, out: Tensor, log_total: Tensor | None, shape: Tiles, cut: Cut
) -> None:
    """Run the body; `out` is the output, or the first split's part of it."""
    table = view.block_table if view.block_table is not None else view.rows
    assert table is not None, "a view has rows or a block table"
    _, query_heads, size = q.shape
    attend[cut.programs, cut.splits](
        q,
        cache.k.data_ptr(),
        cache.v.data_ptr(),
        out,
        log_total,
        view.lengths,
        view.query_starts,
        table,
        table.stride(0),
        *cache.k.stride()[:2],
        *cache.v.stride()[:2],
        q.stride(0),
        out.stride(0),
        q.shape[0] * query_heads,
        cut.row_tiles,
        cut.split_tokens,
        _LOG2_E / math.sqrt(size),
        HEADS=cache.num_kv_heads,
        GROUP=query_heads // cache.num_kv_heads,
        SIZE=size,
        BLOCK_SIZE=0 if view.block_table is None else cache.block_size,
        ALIGNED=alignment(cache),
        **shape._asdict(),
    )


def _merge(parts: Tensor, log_total: Tensor, out: Tensor) -> None:
    """Join the splits of every query head."""
    splits, tokens, query_heads, size = parts.shape
    rows = tokens * query_heads
    merge_splits[rows,](parts, log_total, out, splits, rows, out.stride(0), QUERY_HEADS=query_heads, SIZE=size)
