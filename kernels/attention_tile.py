"""The one body of the numba kernel: attention of some query rows over one tile of at most 256 tokens.

Work is done in squares of 4 query rows x 4 tokens, so that a vector of K or V fetched from memory is used by four
query heads (the group of GQA) before it is let go, and the 16 dot products of a square fill one vector:

    scores[group of tokens, KV head, block of rows] = [ row 0..3 of token 0 | of token 1 | of token 2 | of token 3 ]

A *row* is one query of one query head; rows that share a KV head stand together, in blocks of 4. Tokens are found by
their offsets, whatever the layout: `addressing.py` fills those, and nothing here knows more.

Squares and tiles start at fixed positions, and every sum runs in one fixed order. Hence an output depends on its own
sequence alone, bit for bit: not on layout, block size, batch or threads, nor on whether its query was prefilled.

Scores are in units of log2 (queries come scaled by log2(e) / sqrt(D)), so that weights are powers of two.
"""

import numpy as np

from kvarena.kernels.jit import Array, jit
from kvarena.kernels.simd import (
    CACHE_LINE_BYTES,
    LANES,
    add,
    broadcast4,
    exp2,
    fma,
    fold1,
    fold2,
    fold4,
    fold8,
    load,
    maximum,
    multiply,
    prefetch,
    splat,
    store,
    subtract,
    swap4,
    swap8,
)

TILE = 256  # tokens
ROWS = 4  # of a block
GROUP = 4  # tokens; ROWS * GROUP == LANES
MASKED = np.float32(-1e30)  # a score that weighs nothing; finite, so that masked less masked is a number


@jit
def attend_tile(
    q: Array,  # [heads, rows, D] float32, scaled; rows a multiple of 4
    k: Array,  # all keys, as one dense array: float32, or bfloat16 as uint16
    v: Array,
    k_at: Array,  # [tokens, rounded up to 4]: offset of each token's key of the first head; the last is repeated
    v_at: Array,
    limits: Array,  # [rows]: how many tokens of the tile each row sees
    out: Array,  # [heads, rows, D]: weighted sum of values
    top: Array,  # [heads, rows / 4, 16]: greatest score of each row, four times over
    total: Array,  # [heads, rows / 4, 16]: sum of weights, likewise
) -> None:
    """Attend to one tile by itself: a partial softmax, to be joined to others by `merge`."""
    groups = len(k_at) // GROUP
    scores = np.empty((groups, *top.shape), np.float32)
    _score(q, k, k_at, limits, scores)
    _weigh(scores, top, total)
    out[:] = 0
    _sum(v, v_at, scores, out)


@jit
def merge(out: Array, top: Array, total: Array, tile_out: Array, tile_top: Array, tile_total: Array) -> None:
    """Join a tile to the tiles before it (the online softmax of FlashAttention, Algorithm 1)."""
    size = out.shape[2]
    factors = np.empty((2, LANES), np.float32)
    for block in range(top.size // LANES):
        at = block * LANES
        old, new = load(top, at), load(tile_top, at)
        greatest = maximum(old, new)
        keep, take = exp2(subtract(old, greatest)), exp2(subtract(new, greatest))
        store(top, at, greatest)
        store(total, at, fma(load(total, at), keep, multiply(load(tile_total, at), take)))
        store(factors, 0, keep)
        store(factors, LANES, take)
        keeps, takes = broadcast4(factors, 0), broadcast4(factors, LANES)
        for r in range(ROWS):
            row = (block * ROWS + r) * size
            for d in range(row, row + size, LANES):
                store(out, d, fma(load(out, d), keeps[r], multiply(load(tile_out, d), takes[r])))


@jit
def _score(q: Array, k: Array, at: Array, limits: Array, scores: Array) -> None:
    groups, heads, blocks, _ = scores.shape
    size, all_see = q.shape[2], limits.min()
    for group in range(groups):
        for head in range(heads):
            _prefetch_group(k, at, min(group + 1, groups - 1), head * size, size)
            for block in range(blocks):
                row, square = (head * blocks + block) * ROWS * size, (group * heads + head) * blocks + block
                _score_square(q, row, k, at, group, head * size, size, scores, square)
                if (group + 1) * GROUP > all_see:
                    _mask_square(scores[group, head, block], group * GROUP, limits, block * ROWS)


@jit
def _weigh(scores: Array, top: Array, total: Array) -> None:
    """Turn scores into weights 2^(score - top)."""
    step = top.size
    for at in range(0, step, LANES):
        greatest = load(scores, at)
        for place in range(at + step, scores.size, step):
            greatest = maximum(greatest, load(scores, place))
        greatest = maximum(greatest, swap8(greatest))
        greatest = maximum(greatest, swap4(greatest))
        weights = splat(np.float32(0))
        for place in range(at, scores.size, step):
            weight = exp2(subtract(load(scores, place), greatest))
            store(scores, place, weight)
            weights = add(weights, weight)
        weights = add(weights, swap8(weights))
        store(top, at, greatest)
        store(total, at, add(weights, swap4(weights)))


@jit
def _sum(v: Array, at: Array, weights: Array, out: Array) -> None:
    groups, heads, blocks, _ = weights.shape
    size = out.shape[2]
    for group in range(groups):
        for head in range(heads):
            _prefetch_group(v, at, min(group + 1, groups - 1), head * size, size)
            for block in range(blocks):
                square = (group * heads + head) * blocks + block
                _add_square(
                    out, (head * blocks + block) * ROWS * size, v, at, group, head * size, size, weights, square
                )


@jit
def _prefetch_group(x: Array, at: Array, group: int, shift: int, size: int) -> None:
    """Ask for one head of the four tokens of a group, ahead of their use."""
    for token in range(GROUP * group, GROUP * group + GROUP):
        for d in range(0, size, CACHE_LINE_BYTES // x.itemsize):
            prefetch(x, at[token] + shift + d)


@jit
def _mask_square(square: Array, token: int, limits: Array, row: int) -> None:
    """Take from each row of a square the tokens that it does not see."""
    for t in range(GROUP):
        for r in range(ROWS):
            if token + t >= limits[row + r]:
                square[t * ROWS + r] = MASKED


@jit
def _score_square(
    q: Array, row: int, k: Array, at: Array, group: int, shift: int, size: int, scores: Array, square: int
) -> None:
    """Dot products of 4 rows with the keys of 4 tokens."""
    t = group * GROUP
    k0, k1, k2, k3 = at[t] + shift, at[t + 1] + shift, at[t + 2] + shift, at[t + 3] + shift
    q0, q1, q2, q3 = row, row + size, row + 2 * size, row + 3 * size
    a00 = a01 = a02 = a03 = a10 = a11 = a12 = a13 = splat(np.float32(0))  # a[token][row]
    a20 = a21 = a22 = a23 = a30 = a31 = a32 = a33 = splat(np.float32(0))
    for d in range(0, size, LANES):
        x0, x1, x2, x3 = load(k, k0 + d), load(k, k1 + d), load(k, k2 + d), load(k, k3 + d)
        y = load(q, q0 + d)
        a00, a10, a20, a30 = fma(y, x0, a00), fma(y, x1, a10), fma(y, x2, a20), fma(y, x3, a30)
        y = load(q, q1 + d)
        a01, a11, a21, a31 = fma(y, x0, a01), fma(y, x1, a11), fma(y, x2, a21), fma(y, x3, a31)
        y = load(q, q2 + d)
        a02, a12, a22, a32 = fma(y, x0, a02), fma(y, x1, a12), fma(y, x2, a22), fma(y, x3, a32)
        y = load(q, q3 + d)
        a03, a13, a23, a33 = fma(y, x0, a03), fma(y, x1, a13), fma(y, x2, a23), fma(y, x3, a33)
    token0 = fold4(fold8(a00, a01), fold8(a02, a03))
    token1 = fold4(fold8(a10, a11), fold8(a12, a13))
    token2 = fold4(fold8(a20, a21), fold8(a22, a23))
    token3 = fold4(fold8(a30, a31), fold8(a32, a33))
    store(scores, square * LANES, fold1(fold2(token0, token1), fold2(token2, token3)))


@jit
def _add_square(
    out: Array, row: int, v: Array, at: Array, group: int, shift: int, size: int, weights: Array, square: int
) -> None:
    """Add the values of 4 tokens, weighted, to 4 rows."""
    t = group * GROUP
    v0, v1, v2, v3 = at[t] + shift, at[t + 1] + shift, at[t + 2] + shift, at[t + 3] + shift
    w = square * LANES
    w00, w01, w02, w03 = broadcast4(weights, w)  # w[token][row]
    w10, w11, w12, w13 = broadcast4(weights, w + 4)
    w20, w21, w22, w23 = broadcast4(weights, w + 8)
    w30, w31, w32, w33 = broadcast4(weights, w + 12)
    for d in range(0, size, LANES):
        x0, x1, x2, x3 = load(v, v0 + d), load(v, v1 + d), load(v, v2 + d), load(v, v3 + d)
        o0, o1, o2, o3 = row + d, row + size + d, row + 2 * size + d, row + 3 * size + d
        store(out, o0, fma(w30, x3, fma(w20, x2, fma(w10, x1, fma(w00, x0, load(out, o0))))))
        store(out, o1, fma(w31, x3, fma(w21, x2, fma(w11, x1, fma(w01, x0, load(out, o1))))))
        store(out, o2, fma(w32, x3, fma(w22, x2, fma(w12, x1, fma(w02, x0, load(out, o2))))))
        store(out, o3, fma(w33, x3, fma(w23, x2, fma(w13, x1, fma(w03, x0, load(out, o3))))))
