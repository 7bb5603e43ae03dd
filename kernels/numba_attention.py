"""The `numba` kernel: both layouts through one body (`attention_tile.py`), told apart by offsets alone.

Decode spreads (sequence, tile of 256 tokens) over the threads, all KV heads of a tile together, so that memory is
read in the order in which it lies; the tiles of a sequence are merged afterwards (FlashDecoding). Prefill spreads
(sequence, 16 queries, KV head) and merges tiles as it goes. The arithmetic is the same: a query has the same output,
bit for bit, whether it was decoded or prefilled.
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
from kvarena.kernels.jit import Array, jit
from kvarena.kernels.kernel import AttentionKernel
from kvarena.kernels.layout import Layout
from kvarena.kernels.simd import LANES
from kvarena.kernels.spec import CPU, KernelSpec
from kvarena.kernels.view import BatchView, LayerCache

QUERIES = 16  # of one item of a prefill
_LOG2_E = math.log2(math.e)


class NumbaAttention(AttentionKernel):
    """One body for both layouts, on the CPU. Every length must be at least 1."""

    spec = KernelSpec(
        name="numba",
        body="numba",
        library="kvarena",
        layouts=frozenset(Layout),
        devices=CPU,
        dtypes=frozenset({"float32", "bfloat16"}),
        head_sizes=frozenset(range(16, 257, 16)),
    )

    def decode(self, q: Tensor, cache: LayerCache, view: BatchView, out: Tensor) -> None:
        """Attend with one query per sequence."""
        tiles = _items(view.lengths.numpy(), TILE)
        starts = np.searchsorted(tiles[:, 0], np.arange(view.batch_size + 1))
        _run(_decode_kernels, q, cache, view, out, tiles, starts)

    def prefill(self, q: Tensor, cache: LayerCache, view: BatchView, out: Tensor) -> None:
        """Attend causally with packed queries."""
        query_starts = view.query_starts.numpy()
        _run(_prefill_kernels, q, cache, view, out, _items(np.diff(query_starts), QUERIES), query_starts)


def _items(counts: Array, size: int) -> Array:
    """Cut each of `counts` into items of at most `size`: (sequence, where in it the item starts) [n, 2]."""
    items = -(-counts // size)
    sequence = np.repeat(np.arange(len(counts)), items)
    first = np.arange(len(sequence)) - np.repeat(np.cumsum(items) - items, items)
    return np.stack((sequence, first * size), axis=1)


def _run(kernels: tuple[Any, Any], q: Tensor, cache: LayerCache, view: BatchView, out: Tensor, *items: Array) -> None:
    serial, parallel = kernels
    wanted, settings = threads.compute_threads(), numba.config
    kernel = serial if wanted == 1 else parallel
    numba.set_num_threads(min(wanted, settings.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
    shape = (q.shape[0], cache.num_kv_heads, -1, q.shape[2])  # [T, H, G, D]
    rows = out if out.dtype == torch.float32 and out.is_contiguous() else torch.empty(out.shape)
    queries, results = q.float().contiguous().view(shape).numpy(), rows.view(shape).numpy()
    kernel(queries, flat(cache.k), flat(cache.v), addressing(cache, view), view.lengths.numpy(), *items, results)
    if rows is not out:
        out.copy_(rows)


def _decode(
    q: Array, k: Array, v: Array, where: Addressing, lengths: Array, tiles: Array, starts: Array, results: Array
) -> None:
    heads, blocks = q.shape[1], (q.shape[2] + ROWS - 1) // ROWS
    out = np.empty((len(tiles), heads, blocks * ROWS, q.shape[3]), np.float32)
    top = np.empty((len(tiles), heads, blocks, LANES), np.float32)
    total = np.empty_like(top)
    for i in numba.prange(len(tiles)):
        _decode_tile(q, k, v, where, lengths, tiles[i, 0], tiles[i, 1], out[i], top[i], total[i])
    for i in numba.prange(len(lengths)):
        tile = slice(starts[i], starts[i + 1])
        _join_tiles(out[tile], top[tile], total[tile], results[i : i + 1, 0:heads])


def _prefill(
    q: Array, k: Array, v: Array, where: Addressing, lengths: Array, chunks: Array, starts: Array, results: Array
) -> None:
    heads = q.shape[1]
    for i in numba.prange(len(chunks) * heads):
        sequence, first = chunks[i // heads]
        query = starts[sequence] + first
        end = min(query + QUERIES, starts[sequence + 1])
        past = lengths[sequence] - starts[sequence + 1]
        _prefill_chunk(q, k, v, where, sequence, i % heads, query, end, past, results)


_decode_kernels = jit(_decode), jit(_decode, parallel=True)
_prefill_kernels = jit(_prefill), jit(_prefill, parallel=True)


@jit
def _decode_tile(
    q: Array,
    k: Array,
    v: Array,
    where: Addressing,
    lengths: Array,
    sequence: int,
    first: int,  # position of the tile's first token
    out: Array,
    top: Array,
    total: Array,
) -> None:
    tokens = min(TILE, lengths[sequence] - first)
    rows = _pack(q[sequence : sequence + 1, 0 : q.shape[1]])
    k_at, v_at = _locate(where, sequence, first, tokens)
    attend_tile(rows, k, v, k_at, v_at, np.full(rows.shape[1], tokens), out, top, total)


@jit
def _join_tiles(tile_out: Array, tile_top: Array, tile_total: Array, results: Array) -> None:
    out, top, total = _nothing_yet(tile_top.shape[1], tile_top.shape[2], tile_out.shape[3])
    for tile in range(len(tile_out)):
        merge(out, top, total, tile_out[tile], tile_top[tile], tile_total[tile])
    _unpack(out, total, results)


@jit
def _prefill_chunk(
    q: Array,
    k: Array,
    v: Array,
    where: Addressing,
    sequence: int,
    head: int,
    query: int,  # queries [query, end) of the packed batch
    end: int,
    past: int,  # query i of the packed batch has position past + i
    results: Array,
) -> None:
    group, size = q.shape[2], q.shape[3]
    rows = _pack(q[query:end, head : head + 1])
    out, top, total = _nothing_yet(1, rows.shape[1] // ROWS, size)
    tile_out, tile_top, tile_total = np.empty_like(out), np.empty_like(top), np.empty_like(total)
    for first in range(0, past + end, TILE):
        tokens = min(TILE, past + end - first)
        limits = np.full(rows.shape[1], tokens)
        for row in range((end - query) * group):
            limits[row] = past + query + row // group + 1 - first
        k_at, v_at = _locate(where, sequence, first, tokens)
        k_at += head * size
        v_at += head * size
        attend_tile(rows, k, v, k_at, v_at, limits, tile_out, tile_top, tile_total)
        merge(out, top, total, tile_out, tile_top, tile_total)
    _unpack(out, total, results[query:end, head : head + 1])


@jit
def _nothing_yet(heads: int, blocks: int, size: int) -> tuple[Array, Array, Array]:
    """Partial softmax over no tile: out, top, total as in `attend_tile`."""
    out = np.zeros((heads, blocks * ROWS, size), np.float32)
    return out, np.full((heads, blocks, LANES), MASKED), np.zeros((heads, blocks, LANES), np.float32)


@jit
def _pack(q: Array) -> Array:
    """Queries [n, heads, G, D] as rows [heads, n * G, D], scaled, and padded with zeros to blocks of 4."""
    queries, heads, group, size = q.shape
    scale = np.float32(_LOG2_E / math.sqrt(size))
    rows = np.zeros((heads, (queries * group + ROWS - 1) // ROWS * ROWS, size), np.float32)
    for i in range(queries):
        for head in range(heads):
            for g in range(group):
                for d in range(size):
                    rows[head, i * group + g, d] = q[i, head, g, d] * scale
    return rows


@jit
def _unpack(out: Array, total: Array, results: Array) -> None:
    """Divide rows by their sums of weights, and put them where their queries belong: [n, heads, G, D]."""
    queries, heads, group, size = results.shape
    for i in range(queries):
        for head in range(heads):
            for g in range(group):
                row = i * group + g
                inverse = np.float32(1) / total[head, row // ROWS, row % ROWS]
                for d in range(size):
                    results[i, head, g, d] = out[head, row, d] * inverse


@jit
def _locate(where: Addressing, sequence: int, first: int, tokens: int) -> tuple[Array, Array]:
    """Offsets of K and of V of a tile; the last is repeated up to a multiple of 4, where it will weigh nothing."""
    table, padded = where.table[sequence], (tokens + GROUP - 1) // GROUP * GROUP
    k_at, v_at = np.empty(padded, np.int64), np.empty(padded, np.int64)
    fill_offsets(k_at, table, where.block_size, where.k_block, where.k_token, first, tokens)
    fill_offsets(v_at, table, where.block_size, where.v_block, where.v_token, first, tokens)
    k_at[tokens:] = k_at[tokens - 1]
    v_at[tokens:] = v_at[tokens - 1]
    return k_at, v_at
