"""The one body of the numba kernel: attention of some query rows over one tile of at most 256 tokens.

Work is done in squares of 4 query rows x 4 tokens, so that a vector of K or V fetched from memory is used by four
query heads (the group of GQA) before it is let go, and the 16 dot products of a square fill one vector:

    scores[group, head, block] = [ row 0..3 of token 0 | row 0..3 of token 1 | .. 2 | .. 3 ]

A token is found by its offset, whatever the layout: `addressing.py` fills the offsets, and nothing here knows more.
Squares and tiles start at fixed positions, and each sum runs in one fixed order. Hence an output depends on its own
sequence alone, bit for bit: not on layout, block size, batch, threads, or on whether its query came in a prefill.

Terms: a *row* is one query of one query head; `blocks` is the number of blocks of 4 rows that share a KV head.
Scores are in units of log2 (queries are scaled by log2(e) / sqrt(D)), so that weights are powers of two.
"""

import numpy as np

from kvarena.kernels.jit import Array, jit
from kvarena.kernels.simd import (
    CACHE_LINE_BYTES,
    LANES,
    add,
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
ROWS = 4
GROUP = 4  # tokens; ROWS * GROUP == LANES
MASKED = np.float32(-1e30)  # a score that weighs nothing; finite, so that masked less masked is a number


@jit
def _score_square(
    q: Array, row: int, k: Array, k0: int, k1: int, k2: int, k3: int, size: int, scores: Array, at: int
) -> None:
    """Dot products of 4 rows of q with the keys at offsets k0..k3."""
    z = splat(np.float32(0))
    a00 = a01 = a02 = a03 = a10 = a11 = a12 = a13 = a20 = a21 = a22 = a23 = a30 = a31 = a32 = a33 = z
    for d in range(0, size, LANES):
        x0, x1, x2, x3 = load(k, k0 + d), load(k, k1 + d), load(k, k2 + d), load(k, k3 + d)
        y = load(q, row + d)
        a00, a10, a20, a30 = fma(y, x0, a00), fma(y, x1, a10), fma(y, x2, a20), fma(y, x3, a30)
        y = load(q, row + size + d)
        a01, a11, a21, a31 = fma(y, x0, a01), fma(y, x1, a11), fma(y, x2, a21), fma(y, x3, a31)
        y = load(q, row + 2 * size + d)
        a02, a12, a22, a32 = fma(y, x0, a02), fma(y, x1, a12), fma(y, x2, a22), fma(y, x3, a32)
        y = load(q, row + 3 * size + d)
        a03, a13, a23, a33 = fma(y, x0, a03), fma(y, x1, a13), fma(y, x2, a23), fma(y, x3, a33)
    token0 = fold4(fold8(a00, a01), fold8(a02, a03))
    token1 = fold4(fold8(a10, a11), fold8(a12, a13))
    token2 = fold4(fold8(a20, a21), fold8(a22, a23))
    token3 = fold4(fold8(a30, a31), fold8(a32, a33))
    store(scores, at, fold1(fold2(token0, token1), fold2(token2, token3)))


@jit
def _add_square(
    out: Array, row: int, v: Array, v0: int, v1: int, v2: int, v3: int, size: int, weights: Array, at: int
) -> None:
    """Add the values at offsets v0..v3 to 4 rows of `out`, weighted by a square of weights."""
    w = weights[at : at + LANES]
    w00, w01, w02, w03 = splat(w[0]), splat(w[1]), splat(w[2]), splat(w[3])
    w10, w11, w12, w13 = splat(w[4]), splat(w[5]), splat(w[6]), splat(w[7])
    w20, w21, w22, w23 = splat(w[8]), splat(w[9]), splat(w[10]), splat(w[11])
    w30, w31, w32, w33 = splat(w[12]), splat(w[13]), splat(w[14]), splat(w[15])
    for d in range(0, size, LANES):
        x0, x1, x2, x3 = load(v, v0 + d), load(v, v1 + d), load(v, v2 + d), load(v, v3 + d)
        at0, at1, at2, at3 = row + d, row + size + d, row + 2 * size + d, row + 3 * size + d
        store(out, at0, fma(w30, x3, fma(w20, x2, fma(w10, x1, fma(w00, x0, load(out, at0))))))
        store(out, at1, fma(w31, x3, fma(w21, x2, fma(w11, x1, fma(w01, x0, load(out, at1))))))
        store(out, at2, fma(w32, x3, fma(w22, x2, fma(w12, x1, fma(w02, x0, load(out, at2))))))
        store(out, at3, fma(w33, x3, fma(w23, x2, fma(w13, x1, fma(w03, x0, load(out, at3))))))


@jit
def _prefetch_group(x: Array, at: Array, group: int, shift: int, size: int) -> None:
    """Ask for one head of the four tokens of a group, ahead of their use."""
    step = CACHE_LINE_BYTES // x.itemsize
    for token in range(GROUP * group, GROUP * group + GROUP):
        for d in range(0, size, step):
            prefetch(x, at[token] + shift + d)


@jit
def _mask_square(scores: Array, at: int, token: int, limits: Array, row: int) -> None:
    """Take from each row of a square the tokens it must not see."""
    for t in range(GROUP):
        for r in range(ROWS):
            if token + t >= limits[row + r]:
                scores[at + t * ROWS + r] = MASKED


@jit
def _score_tile(
    q: Array,
    k: Array,
    at: Array,
    tokens: int,
    limits: Array,
    head0: int,
    heads: int,
    blocks: int,
    size: int,
    scores: Array,
) -> None:
    groups, all_see = (tokens + GROUP - 1) // GROUP, limits.min()
    for group in range(groups):
        t, following = GROUP * group, min(group + 1, groups - 1)
        for head in range(heads):
            shift = (head0 + head) * size
            _prefetch_group(k, at, following, shift, size)
            k0, k1, k2, k3 = at[t] + shift, at[t + 1] + shift, at[t + 2] + shift, at[t + 3] + shift
            for block in range(blocks):
                square = head * blocks + block
                place = (group * heads * blocks + square) * LANES
                _score_square(q, square * ROWS * size, k, k0, k1, k2, k3, size, scores, place)
                if t + GROUP > all_see:
                    _mask_square(scores, place, t, limits, block * ROWS)


@jit
def _weigh_tile(scores: Array, groups: int, squares: int, top: Array, total: Array) -> None:
    """Turn scores into weights 2^(score - top), with `top` the greatest of each row and `total` their sum."""
    for square in range(squares):
        greatest = load(scores, square * LANES)
        for group in range(1, groups):
            greatest = maximum(greatest, load(scores, (group * squares + square) * LANES))
        greatest = maximum(greatest, swap8(greatest))
        greatest = maximum(greatest, swap4(greatest))
        weight_sum = splat(np.float32(0))
        for group in range(groups):
            place = (group * squares + square) * LANES
            weight = exp2(subtract(load(scores, place), greatest))
            store(scores, place, weight)
            weight_sum = add(weight_sum, weight)
        weight_sum = add(weight_sum, swap8(weight_sum))
        store(top, square * LANES, greatest)
        store(total, square * LANES, add(weight_sum, swap4(weight_sum)))


@jit
def _sum_tile(
    v: Array, at: Array, groups: int, head0: int, heads: int, blocks: int, size: int, weights: Array, out: Array
) -> None:
    for group in range(groups):
        t, following = GROUP * group, min(group + 1, groups - 1)
        for head in range(heads):
            shift = (head0 + head) * size
            _prefetch_group(v, at, following, shift, size)
            v0, v1, v2, v3 = at[t] + shift, at[t + 1] + shift, at[t + 2] + shift, at[t + 3] + shift
            for block in range(blocks):
                square = head * blocks + block
                place = (group * heads * blocks + square) * LANES
                _add_square(out, square * ROWS * size, v, v0, v1, v2, v3, size, weights, place)


@jit
def attend_tile(
    q: Array,  # [heads * blocks * 4 * size] float32, scaled
    k: Array,  # all keys, as one dense array of float32 or of bfloat16 as uint16
    v: Array,
    k_at: Array,  # [tokens, rounded up to 4]: offset of each token's K; the last is repeated
    v_at: Array,
    tokens: int,  # at most 256
    limits: Array,  # [blocks * 4]: how many tokens of the tile each row sees
    head0: int,  # KV heads [head0, head0 + heads) are done
    heads: int,
    blocks: int,
    size: int,  # head size
    out: Array,  # [heads * blocks * 4 * size]: weighted sum of values
    top: Array,  # [heads * blocks * 16]: greatest score of each row, four times over
    total: Array,  # [heads * blocks * 16]: sum of weights, likewise
) -> None:
    """Attend to one tile by itself: a partial softmax, to be joined by `merge`."""
    squares, groups = heads * blocks, (tokens + GROUP - 1) // GROUP
    scores = np.empty(groups * squares * LANES, np.float32)
    _score_tile(q, k, k_at, tokens, limits, head0, heads, blocks, size, scores)
    _weigh_tile(scores, groups, squares, top, total)
    out[:] = 0
    _sum_tile(v, v_at, groups, head0, heads, blocks, size, scores, out)


@jit
def merge(out: Array, top: Array, total: Array, tile_out: Array, tile_top: Array, tile_total: Array, size: int) -> None:
    """Join a tile to the partial softmax of the tiles before it (the online softmax of FlashAttention, Algorithm 1)."""
    for square in range(top.size // LANES):
        at = square * LANES
        old, new = load(top, at), load(tile_top, at)
        greatest = maximum(old, new)
        keep, take = exp2(subtract(old, greatest)), exp2(subtract(new, greatest))
        store(total, at, fma(load(total, at), keep, multiply(load(tile_total, at), take)))
        store(top, at, keep)  # lends its place for the four factors of the rows
        store(tile_top, at, take)
        for r in range(ROWS):
            k, t = splat(top[at + r]), splat(tile_top[at + r])
            row = (square * ROWS + r) * size
            for d in range(row, row + size, LANES):
                store(out, d, fma(load(out, d), k, multiply(load(tile_out, d), t)))
        store(top, at, greatest)
