"""The one body of the `triton` kernel: split-KV attention for decode and prefill, over rows and over blocks.

A program takes up to ROWS query rows of one sequence and one KV head, and one *split* of the keys they see. A query
row is (query i, query head g of the group that shares the KV head), numbered i * GROUP + g, so that a tile of K read
from memory serves the whole group; a decode is the case of one query:

    program (head, tile, sequence) x split:   rows [tile * ROWS, + ROWS)   keys [split * split_tokens, + split_tokens)

With one split it writes the output. With more it writes a partial output with the logarithm of its sum of weights,
and `merge_splits` joins the splits (FlashDecoding). The two layouts differ in `locate` alone.

Scores are in units of log2 (`scale` holds log2(e) / sqrt(D)), so that weights are powers of two.
"""

# mypy: disable-error-code="untyped-decorator"

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

MASKED = tl.constexpr(-1e30)  # a score that weighs nothing; finite, so that masked less masked is a number
SPLITS_AT_ONCE = tl.constexpr(16)

# These vary from step to step; specialising on their values would compile in the middle of a run.
_VARYING = ["table_stride", "row_tiles", "split_tokens", "split_stride"]
_UNALIGNED = ["lengths", "query_starts", "table"]


@triton.jit
def pointer_to(address: tl.tensor, like: tl.tensor, ALIGNED: tl.constexpr) -> tl.tensor:
    """A pointer of the type of `like`; ALIGNED bytes divide the address.

    K and V come as numbers because Triton's launcher asks the driver about the first byte of every tensor, and refuses
    one that is not mapped: a vAttention tensor whose row 0 nobody uses.
    """
    return tl.multiple_of(address.to(like.dtype), ALIGNED)


@triton.jit
def locate(
    table: tl.tensor, position: tl.tensor, end: tl.tensor, BLOCK_SIZE: tl.constexpr, MASK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Block and slot of positions [TILE]: the only code that tells one layout from the other.

    `table` points to the row of a sequence (BLOCK_SIZE 0), which is one long block, or to its list of blocks.
    """
    if BLOCK_SIZE == 0:
        block, slot = tl.load(table), position
    else:
        if MASK:  # entries past the length are undefined
            block = tl.load(table + position // BLOCK_SIZE, mask=position < end, other=0)
        else:
            block = tl.load(table + position // BLOCK_SIZE)
        slot = position % BLOCK_SIZE
    return block.to(tl.int64), slot.to(tl.int64)


@triton.jit
def load_tile(
    x: tl.tensor, offset: tl.tensor, position: tl.tensor, end: tl.tensor, SIZE: tl.constexpr, MASK: tl.constexpr
) -> tl.tensor:
    """K or V of one head at a tile of tokens: [TILE, SIZE]; zero, and not read, at `end` and beyond."""
    at = x + offset[:, None] + tl.arange(0, SIZE)[None, :]
    if MASK:
        return tl.load(at, mask=(position < end)[:, None], other=0.0)
    return tl.load(at)


@triton.jit
def attend_tiles(
    acc: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    table: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    sees: tl.tensor,
    k_block_stride: tl.tensor,
    k_token_stride: tl.tensor,
    v_block_stride: tl.tensor,
    v_token_stride: tl.tensor,
    scale: tl.tensor,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    MASK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Add the keys [first, end) to rows whose online softmax so far is (acc [ROWS, SIZE], top, total [ROWS]).

    Without MASK, `first` and `end` bound whole tiles that every row sees.
    """
    for start in range(first, end, TILE):
        position = start + tl.arange(0, TILE)
        block, slot = locate(table, position, end, BLOCK_SIZE, MASK)
        k_tile = load_tile(k, block * k_block_stride + slot * k_token_stride, position, end, SIZE, MASK)
        scores = tl.dot(q, tl.trans(k_tile), input_precision="ieee") * scale  # [ROWS, TILE]
        if MASK:
            scores = tl.where((position < end)[None, :] & (position[None, :] < sees[:, None]), scores, MASKED)
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        top = new_top
        v_tile = load_tile(v, block * v_block_stride + slot * v_token_stride, position, end, SIZE, MASK)
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision="ieee")
    return acc, top, total


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def attend(
    q: tl.tensor,  # [T, HEADS * GROUP, SIZE]
    k_address: tl.tensor,  # int64: see `pointer_to`
    v_address: tl.tensor,
    out: tl.tensor,  # as q, or float32 [splits, T, HEADS * GROUP, SIZE]
    log_total: tl.tensor,  # float32 [splits, T, HEADS * GROUP], or None where there is one split
    lengths: tl.tensor,
    query_starts: tl.tensor,
    table: tl.tensor,
    table_stride: tl.tensor,
    k_block_stride: tl.tensor,
    k_token_stride: tl.tensor,
    v_block_stride: tl.tensor,
    v_token_stride: tl.tensor,
    q_token_stride: tl.tensor,
    out_token_stride: tl.tensor,
    split_stride: tl.tensor,  # query heads of one split: T * HEADS * GROUP
    row_tiles: tl.tensor,  # programs of the longest run of queries
    split_tokens: tl.tensor,  # a multiple of TILE
    scale: tl.tensor,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Attention of one tile of query rows over one split of its keys; the grid is drawn above."""
    program, split = tl.program_id(0), tl.program_id(1)
    head = program % HEADS
    tile = row_tiles - 1 - program // HEADS % row_tiles  # the longest first
    sequence = program // HEADS // row_tiles
    start = tl.load(query_starts + sequence)
    queries = tl.load(query_starts + sequence + 1) - start
    if tile * ROWS >= queries * GROUP:
        return
    before = tl.load(lengths + sequence) - queries  # tokens before the first query
    row = tile * ROWS + tl.arange(0, ROWS)
    exists = row < queries * GROUP
    sees = before + row // GROUP + 1
    token = (start + row // GROUP).to(tl.int64)
    query_head = head * GROUP + row % GROUP

    # Never more splits than the grid has, should a sequence outgrow the length it was launched for.
    share = tl.cdiv(tl.cdiv(before + queries, tl.num_programs(1)), TILE) * TILE
    tokens = tl.maximum(split_tokens, share)
    first = split * tokens
    end = tl.minimum(first + tokens, before + tl.minimum(tl.cdiv((tile + 1) * ROWS, GROUP), queries))
    all_see = tl.minimum(end, before + tile * ROWS // GROUP + 1)
    whole = tl.maximum(first, all_see // TILE * TILE)

    acc = tl.zeros([ROWS, SIZE], tl.float32)
    top = tl.full([ROWS], MASKED, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if first < end:
        size = tl.arange(0, SIZE)
        q_at = token[:, None] * q_token_stride + query_head[:, None] * SIZE + size[None, :]
        q_rows = tl.load(q + q_at, mask=exists[:, None], other=0.0)
        k_head = pointer_to(k_address, q, ALIGNED) + head * SIZE
        v_head = pointer_to(v_address, q, ALIGNED) + head * SIZE
        entries = table + sequence.to(tl.int64) * table_stride
        acc, top, total = attend_tiles(
            acc, top, total, q_rows, k_head, v_head, entries, first, whole, sees,
            k_block_stride, k_token_stride, v_block_stride, v_token_stride, scale, SIZE, BLOCK_SIZE, TILE, False,
        )  # fmt: skip
        acc, top, total = attend_tiles(
            acc, top, total, q_rows, k_head, v_head, entries, whole, end, sees,
            k_block_stride, k_token_stride, v_block_stride, v_token_stride, scale, SIZE, BLOCK_SIZE, TILE, True,
        )  # fmt: skip
        out_at = token[:, None] * out_token_stride + query_head[:, None] * SIZE + size[None, :]
        if log_total is not None:
            out_at += split.to(tl.int64) * split_stride * SIZE
        tl.store(out + out_at, (acc / total[:, None]).to(out.dtype.element_ty), mask=exists[:, None])
    if log_total is not None:  # MASKED where a row sees no key of this split
        weight = top + tl.log2(tl.maximum(total, 1e-30))
        place = split.to(tl.int64) * split_stride + token * (HEADS * GROUP) + query_head
        tl.store(log_total + place, weight, mask=exists)


@triton.jit(do_not_specialize=["splits", "split_stride"])
def merge_splits(
    parts: tl.tensor,  # float32 [splits, T, Hq, SIZE]
    log_total: tl.tensor,  # float32 [splits, T, Hq]
    out: tl.tensor,  # [T, Hq, SIZE]
    splits: tl.tensor,
    split_stride: tl.tensor,
    out_token_stride: tl.tensor,
    QUERY_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    """Join the splits of one query head: a mean of their outputs, weighted by their sums of weights."""
    row = tl.program_id(0).to(tl.int64)
    size = tl.arange(0, SIZE)
    acc = tl.zeros([SIZE], tl.float32)
    top = tl.full([1], MASKED, tl.float32)
    total = tl.zeros([1], tl.float32)
    for start in range(0, splits, SPLITS_AT_ONCE):
        split = start + tl.arange(0, SPLITS_AT_ONCE)
        place = split.to(tl.int64) * split_stride + row
        log = tl.load(log_total + place, mask=split < splits, other=MASKED)
        part = tl.load(parts + place[:, None] * SIZE + size[None, :], mask=(log > MASKED)[:, None], other=0.0)
        new_top = tl.maximum(top, tl.max(log, 0))
        weights, shrink = tl.exp2(log - new_top), tl.exp2(top - new_top)
        acc = acc * shrink + tl.sum(part * weights[:, None], 0)
        total = total * shrink + tl.sum(weights, 0)
        top = new_top
    at = row // QUERY_HEADS * out_token_stride + row % QUERY_HEADS * SIZE + size
    tl.store(out + at, (acc / total).to(out.dtype.element_ty))
