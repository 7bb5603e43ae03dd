"""The `numba` kernel: both layouts through one body (`attention_tile.py`), told apart by a table of offsets alone.

Decode spreads (sequence, tile of 256 tokens) over the threads, all KV heads of a tile together, so that memory is
read in the order in which it lies; the tiles of a sequence are merged afterwards (FlashDecoding). Prefill spreads
(sequence, 16 queries, KV head) and merges tiles as it goes. The arithmetic is the same, so a query has the same
output whether it was decoded or prefilled.
"""

import math
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from kvarena.kernels import threads
from kvarena.kernels.addressing import Addressing, addressing, fill_offsets, flat
from kvarena.kernels.attention_tile import GROUP, MASKED, ROWS, TILE, attend_tile, merge
from kvarena.kernels.catalogue import NUMBA
from kvarena.kernels.jit import Array, jit
from kvarena.kernels.kernel import AttentionKernel
from kvarena.kernels.simd import LANES
from kvarena.kernels.view import BatchView, LayerCache

QUERIES = 16  # of one item of a prefill
_LOG2_E = math.log2(math.e)


@jit
def _pack(q: Array, query0: int, queries: int, head0: int, heads: int, blocks: int, group: int) -> Array:
    """Rows of the queries [query0, query0 + queries), by KV head, scaled, padded with zeros to blocks of 4."""
    size = q.shape[2]
    scale = np.float32(_LOG2_E / math.sqrt(size))
    packed = np.zeros((heads, blocks * ROWS, size), np.float32)
    for head in range(heads):
        for i in range(queries):
            for g in range(group):
                for d in range(size):
                    packed[head, i * group + g, d] = q[query0 + i, (head0 + head) * group + g, d] * scale
    return packed.reshape(-1)


@jit
def _unpack(
    out: Array, query0: int, queries: int, head0: int, heads: int, blocks: int, group: int, packed: Array, total: Array
) -> None:
    """Divide rows by their sums of weights, and put them where their queries belong."""
    size = out.shape[2]
    for head in range(heads):
        for i in range(queries):
            for g in range(group):
                row = i * group + g
                block = head * blocks + row // ROWS
                inverse = np.float32(1) / total[block * LANES + row % ROWS]
                start = (block * ROWS + row % ROWS) * size
                for d in range(size):
                    out[query0 + i, (head0 + head) * group + g, d] = packed[start + d] * inverse


@jit
def _locate(where: Addressing, sequence: int, first: int, tokens: int) -> tuple[Array, Array]:
    """Offsets of K and of V of a tile; the last is repeated up to a multiple of 4, where it will weigh nothing."""
    padded = (tokens + GROUP - 1) // GROUP * GROUP
    k_at, v_at = np.empty(padded, np.int64), np.empty(padded, np.int64)
    table = where.table[sequence]
    fill_offsets(k_at, table, where.block_size, where.k_strides, first, tokens)
    fill_offsets(v_at, table, where.block_size, where.v_strides, first, tokens)
    k_at[tokens:] = k_at[tokens - 1]
    v_at[tokens:] = v_at[tokens - 1]
    return k_at, v_at


@jit
def _decode_tile(
    item: int,
    q: Array,
    k: Array,
    v: Array,
    where: Addressing,
    lengths: Array,
    tile_starts: Array,
    group: int,
    part_out: Array,
    part_top: Array,
    part_total: Array,
) -> None:
    sequence: Any = np.searchsorted(tile_starts, item, side="right") - 1
    first = (item - tile_starts[sequence]) * TILE
    tokens = min(TILE, lengths[sequence] - first)
    heads, blocks, size = q.shape[1] // group, (group + ROWS - 1) // ROWS, q.shape[2]
    k_at, v_at = _locate(where, sequence, first, tokens)
    rows = _pack(q, sequence, 1, 0, heads, blocks, group)
    limits = np.full(blocks * ROWS, tokens, np.int64)
    attend_tile(
        rows, k, v, k_at, v_at, tokens, limits, 0, heads, blocks, size, part_out[item], part_top[item], part_total[item]
    )


@jit
def _decode_sequence(
    sequence: int, out: Array, tile_starts: Array, group: int, part_out: Array, part_top: Array, part_total: Array
) -> None:
    heads, blocks, size = out.shape[1] // group, (group + ROWS - 1) // ROWS, out.shape[2]
    rows = np.zeros(part_out.shape[1], np.float32)
    top = np.full(part_top.shape[1], MASKED, np.float32)
    total = np.zeros(part_top.shape[1], np.float32)
    for item in range(tile_starts[sequence], tile_starts[sequence + 1]):
        merge(rows, top, total, part_out[item], part_top[item], part_total[item], size)
    _unpack(out, sequence, 1, 0, heads, blocks, group, rows, total)


@jit
def _prefill_item(
    item: int,
    q: Array,
    k: Array,
    v: Array,
    where: Addressing,
    lengths: Array,
    query_starts: Array,
    item_starts: Array,
    group: int,
    out: Array,
) -> None:
    heads, size = q.shape[1] // group, q.shape[2]
    sequence: Any = np.searchsorted(item_starts, item // heads, side="right") - 1
    head, chunk = item % heads, item // heads - item_starts[sequence]
    query0 = query_starts[sequence] + chunk * QUERIES
    queries = min(QUERIES, query_starts[sequence + 1] - query0)
    blocks = (queries * group + ROWS - 1) // ROWS
    sees = lengths[sequence] - query_starts[sequence + 1] + query0 + 1  # tokens that the first query sees
    rows = _pack(q, query0, queries, head, 1, blocks, group)
    done, part = np.zeros(rows.size, np.float32), np.empty(rows.size, np.float32)
    top, total = np.full(blocks * LANES, MASKED, np.float32), np.zeros(blocks * LANES, np.float32)
    part_top, part_total = np.empty(blocks * LANES, np.float32), np.empty(blocks * LANES, np.float32)
    for first in range(0, sees + queries - 1, TILE):
        tokens = min(TILE, sees + queries - 1 - first)
        limits = np.full(blocks * ROWS, tokens, np.int64)
        for row in range(queries * group):
            limits[row] = sees + row // group - first
        k_at, v_at = _locate(where, sequence, first, tokens)
        attend_tile(rows, k, v, k_at, v_at, tokens, limits, head, 1, blocks, size, part, part_top, part_total)
        merge(done, top, total, part, part_top, part_total, size)
    _unpack(out, query0, queries, head, 1, blocks, group, done, total)


def _decode(
    q: Array, k: Array, v: Array, where: Addressing, lengths: Array, tile_starts: Array, group: int, out: Array
) -> None:
    tiles, heads, blocks, size = tile_starts[-1], q.shape[1] // group, (group + ROWS - 1) // ROWS, q.shape[2]
    part_out = np.empty((tiles, heads * blocks * ROWS * size), np.float32)
    part_top = np.empty((tiles, heads * blocks * LANES), np.float32)
    part_total = np.empty((tiles, heads * blocks * LANES), np.float32)
    for item in numba.prange(tiles):
        _decode_tile(item, q, k, v, where, lengths, tile_starts, group, part_out, part_top, part_total)
    for sequence in numba.prange(lengths.size):
        _decode_sequence(sequence, out, tile_starts, group, part_out, part_top, part_total)


def _prefill(
    q: Array,
    k: Array,
    v: Array,
    where: Addressing,
    lengths: Array,
    query_starts: Array,
    item_starts: Array,
    group: int,
    out: Array,
) -> None:
    for item in numba.prange(item_starts[-1] * (q.shape[1] // group)):
        _prefill_item(item, q, k, v, where, lengths, query_starts, item_starts, group, out)


_serial: tuple[Any, Any] = (jit(_decode), jit(_prefill))
_parallel: tuple[Any, Any] = (jit(_decode, parallel=True), jit(_prefill, parallel=True))


def _starts(counts: Array, per_item: int) -> Array:
    """Where the items of each sequence start, if an item takes `per_item` of its `counts`: [B + 1]."""
    return np.concatenate(([0], np.cumsum(-(-counts // per_item)))).astype(np.int64)


class NumbaAttention(AttentionKernel):
    """One body for both layouts, on the CPU. Lengths must be at least 1."""

    spec = NUMBA

    def decode(self, q: Tensor, cache: LayerCache, view: BatchView, out: Tensor) -> None:
        """Attend with one query per sequence."""
        lengths = view.lengths.numpy()
        self._run(0, q, cache, view, out, _starts(lengths, TILE))

    def prefill(self, q: Tensor, cache: LayerCache, view: BatchView, out: Tensor) -> None:
        """Attend causally with packed queries."""
        query_starts = view.query_starts.numpy()
        self._run(1, q, cache, view, out, query_starts, _starts(np.diff(query_starts), QUERIES))

    @staticmethod
    def _run(which: int, q: Tensor, cache: LayerCache, view: BatchView, out: Tensor, *starts: Array) -> None:
        count = threads.compute_threads()
        entry = (_serial if count == 1 else _parallel)[which]
        group = q.shape[1] // cache.num_kv_heads
        rows = out if out.dtype == torch.float32 and out.is_contiguous() else torch.empty(out.shape)
        entry(
            q.float().contiguous().numpy(),
            flat(cache.k),
            flat(cache.v),
            addressing(cache, view),
            view.lengths.numpy(),
            *starts,
            group,
            rows.numpy(),
        )
        if rows is not out:
            out.copy_(rows)
