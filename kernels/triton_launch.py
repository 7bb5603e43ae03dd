"""How the work of the `triton` kernel is cut: tiles by head size, splits by the multiprocessors there are.

The numbers are reckoned from compiled code (shared memory, registers: three decode programs fit on a multiprocessor
of an H100) and not yet tuned on a GPU; `benchmarks/triton_decode.py` prints what others would give.
"""

from functools import cache
from typing import NamedTuple

import torch

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
    num_stages: int


def tiles(head_size: int, item_bytes: int, rows: int, paged: bool) -> Tiles:
    """The program for a call whose sequences bring at most `rows` query rows (queries x group)."""
    tile = max(16, min(128, K_TILE_BYTES // (head_size * item_bytes)))
    if rows <= 16:
        shape = Tiles(16, tile, num_warps=4, num_stages=3)
    elif item_bytes > 2:  # no tensor cores: as many registers as there are
        shape = Tiles(32, tile, num_warps=4, num_stages=2)
    elif rows <= 64 or head_size > 128:
        shape = Tiles(64, min(tile, 64), num_warps=4 if head_size <= 128 else 8, num_stages=2)
    else:
        shape = Tiles(128, min(tile, 64), num_warps=8, num_stages=3)
    # Triton's pipeline spends a stage on fetching block numbers ahead for each stage of K and V.
    return shape._replace(num_stages=2 * shape.num_stages - 1) if paged else shape


def split_tokens(programs: int, max_length: int, wanted: int, most: int, tile: int) -> int:
    """Tokens of one split, a multiple of `tile`.

    `programs` tiles of queries become about `wanted` programs, but no split is longer than `most` tokens, nor all
    of them shorter than FEWEST_SPLIT_TOKENS.
    """
    splits = max(wanted // programs, -(-max_length // most))
    splits = max(1, min(splits, max_length // FEWEST_SPLIT_TOKENS))
    return -(-max_length // (splits * tile)) * tile


@cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors; 1 where there is no GPU, as under Triton's interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
