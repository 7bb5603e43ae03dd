"""Where tokens lie: the only code of the numba kernels that tells one layout from the other, and it does not.

A row of the contiguous layout is a block as long as the row: with `table = rows[:, None]`, position p of either
layout is block table[p // P], slot p % P. `flat` shows a strided cache as one dense array to index into.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kvarena.kernels.jit import Array, jit
from kvarena.kernels.view import BatchView, LayerCache


class Addressing(NamedTuple):
    """What `fill_offsets` needs; strides are in elements."""

    table: Array  # [B, blocks] int32
    block_size: int  # tokens
    k_block: int  # from block to block
    k_token: int  # from token to token
    v_block: int
    v_token: int


def addressing(cache: LayerCache, view: BatchView) -> Addressing:
    """Describe where the K/V of a batch lies."""
    if view.block_table is not None:
        table = view.block_table
    else:
        assert view.rows is not None, "a view has rows or a block table"
        table = view.rows[:, None]
    strides = (stride for x in (cache.k, cache.v) for stride in x.stride()[:2])
    return Addressing(table.to(torch.int32).contiguous().numpy(), cache.block_size, *strides)


def flat(x: Tensor) -> Array:
    """Show [N, P, H, D] with free outer strides as one dense array without copying; bfloat16 becomes uint16."""
    extent = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    dense = x.as_strided((extent,), (1,))
    array: Array = (dense.view(torch.uint16) if x.dtype == torch.bfloat16 else dense).numpy()
    return array


@jit
def fill_offsets(
    at: Array, table: Array, block_size: int, block_stride: int, token_stride: int, first: int, count: int
) -> None:
    """Write to `at` the offsets of positions [first, first + count) of a sequence whose blocks are `table`."""
    done = 0
    while done < count:
        block, slot = divmod(first + done, block_size)
        run = min(block_size - slot, count - done)
        start = table[block] * block_stride + slot * token_stride
        for i in range(run):
            at[done + i] = start + i * token_stride
        done += run
