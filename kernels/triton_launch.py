"""How the work of the `triton` kernel is cut: tiles by head size, splits by the multiprocessors there are.

The numbers are reckoned from compiled code (shared memory, registers: three decode programs fit on a multiprocessor
of an H100) and not yet tuned on a GPU; `benchmarks/triton_decode.py` prints what others would give.
"""

import math
from functools import cache
from typing import NamedTuple

import torch

from kvarena.kernels.view import LayerCache

K_TILE_BYTES = 16 * 1024  # of K, and as much of V, per stage: 64 tokens of bfloat16 at head size 128
DECODE_PROGRAMS = 4  # per multiprocessor, at least: the three that fit, and some to even out
PREFILL_PROGRAMS = 1  # a prefill splits its keys only where its queries leave multiprocessors idle
FEWEST_SPLIT_TOKENS = 256  # below, joining the splits would cost more than they save
MOST_SPLIT_TOKENS = (
    1024  # of a decode: enough to forget the joining (1 % of the traffic), little to wait for at the end
)


class Tiles(NamedTuple):
    """The shape of one program; names as in `triton_body.py`."""

    ROWS: int  # query rows; at least 16, which is what tensor cores take
    TILE: int  # tokens
    num_warps: int
    num_stages: int  # tiles of K and V under way, and the one in use

    def over_blocks(self) -> "Tiles":
        """Keep as many tiles under way: Triton's pipeline spends a stage on the block numbers of each."""
        return self._replace(num_stages=2 * self.num_stages - 1)


def tiles(head_size: int, item_bytes: int, rows: int) -> Tiles:
    """The program for a call whose sequences bring at most `rows` query rows (queries x group)."""
    tile = max(16, min(128, K_TILE_BYTES // (head_size * item_bytes)))
    if rows <= 16:
        return Tiles(16, tile, num_warps=4, num_stages=3)
    if item_bytes > 2:  # no tensor cores: as many rows as there are registers
        return Tiles(32, tile, num_warps=4, num_stages=2)
    if rows <= 64 or head_size > 128:
        return Tiles(64, min(tile, 64), num_warps=4 if head_size <= 128 else 8, num_stages=2)
    return Tiles(128, min(tile, 64), num_warps=8, num_stages=3)


class Work(NamedTuple):
    """What one call has to do."""

    batch_size: int
    heads: int  # KV heads
    rows: int  # query rows (queries x group) of the sequence that brings most
    max_length: int


class Cut(NamedTuple):
    """A grid of programs; the words are those of `triton_body.py`."""

    row_tiles: int
    programs: int  # row tiles of all sequences and KV heads
    splits: int
    split_tokens: int  # a multiple of the tile


def cut_decode(work: Work, shape: Tiles, multiprocessors: int) -> Cut:
    """Enough splits to fill the GPU, and none so long that the rest would wait for it."""
    return _cut(work, shape, DECODE_PROGRAMS * multiprocessors, MOST_SPLIT_TOKENS)


def cut_prefill(work: Work, shape: Tiles, multiprocessors: int) -> Cut:
    """Splits only where the tiles of queries leave multiprocessors idle."""
    return _cut(work, shape, PREFILL_PROGRAMS * multiprocessors, work.max_length)


def _cut(work: Work, shape: Tiles, wanted: int, most_tokens: int) -> Cut:
    """About `wanted` programs, of splits of FEWEST_SPLIT_TOKENS to `most_tokens`."""
    row_tiles = -(-work.rows // shape.ROWS)
    programs = row_tiles * work.batch_size * work.heads
    splits = max(wanted // programs, -(-work.max_length // most_tokens))
    splits = max(1, min(splits, work.max_length // FEWEST_SPLIT_TOKENS))
    tokens = -(-work.max_length // (splits * shape.TILE)) * shape.TILE
    return Cut(row_tiles, programs, -(-work.max_length // tokens), tokens)


def alignment(cache: LayerCache) -> int:
    """Bytes, up to the 16 that one thread loads at once, that divide the addresses of K and V."""
    return math.gcd(16, cache.k.data_ptr(), cache.v.data_ptr())


@cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors; 1 where there is no GPU, as under Triton's interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
