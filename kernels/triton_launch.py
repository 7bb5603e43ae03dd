"""How the work of the `triton` kernel is cut: tiles by head size, splits by the multiprocessors there are."""

from functools import cache
from typing import NamedTuple

import torch

K_TILE_BYTES = 16 * 1024  # of K, and as much of V, per stage: 64 tokens of bfloat16 at head size 128
DECODE_PROGRAMS = 8  # per multiprocessor: two or three fit at a time, and a few rounds even out
PREFILL_PROGRAMS = 1  # a prefill splits its keys only where its queries leave multiprocessors idle
SPLIT_TOKENS = (256, 4096)  # fewer: mostly overhead; more: one long sequence outlasts a batch of short ones


class Tiles(NamedTuple):
    """The shape of one program; names as in `triton_body.py`."""

    ROWS: int  # query rows; at least 16, which is what tensor cores take
    TILE: int  # tokens
    num_warps: int
    num_stages: int


def tiles(head_size: int, item_bytes: int, rows: int) -> Tiles:
    """The program for a call whose sequences bring at most `rows` query rows (queries x group)."""
    tile = max(16, min(128, K_TILE_BYTES // (head_size * item_bytes)))
    if rows <= 16:
        return Tiles(16, tile, num_warps=4, num_stages=3)
    if rows <= 64 or head_size > 128 or item_bytes > 2:
        return Tiles(32 if item_bytes > 2 else 64, tile, num_warps=4, num_stages=2)
    return Tiles(128, tile, num_warps=8, num_stages=3)


def split_tokens(programs: int, max_length: int, wanted: int, tile: int) -> int:
    """Tokens of one split, a multiple of `tile`, so that `programs` tiles of queries become about `wanted` programs."""
    fewest, most = SPLIT_TOKENS
    if programs >= wanted:
        return most
    tokens = min(max(max_length * programs // wanted, fewest), most)
    return -(-tokens // tile) * tile


@cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors; 1 where there is no GPU, as under Triton's interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
