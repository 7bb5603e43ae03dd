"""The same K/V as rows and as blocks, so that kernels are timed on one layout and the other over the same bytes.

rows        k, v: [R, S, H, D]            batch c of B sequences owns rows [c B, (c + 1) B)
blocks      k, v: [R S / P, P, H, D]      the same memory; a table of blocks per sequence, in order or scattered
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kvarena.kernels.layout import Layout
from kvarena.kernels.view import BatchView, LayerCache


class Arrangement(NamedTuple):
    """Where a sequence's tokens lie."""

    block_size: int | None  # tokens, a divisor of a row's; None: one row
    scattered: bool = False

    @property
    def layout(self) -> Layout:
        """What a kernel must be able to read."""
        return Layout.CONTIGUOUS if self.block_size is None else Layout.PAGED


def arranged(
    k: Tensor, v: Tensor, arrangement: Arrangement, batch: int, context: int, random: torch.Generator | None = None
) -> tuple[LayerCache, list[BatchView]]:
    """K and V [R, S, H, D] so arranged, and a view of each `batch` sequences: `context` tokens and one query each."""
    device, size = k.device, arrangement.block_size
    if size is None:
        cache = LayerCache(Layout.CONTIGUOUS, k, v)
        owners = torch.arange(len(k), dtype=torch.int32, device=device)  # [R]
    else:
        cache = LayerCache(Layout.PAGED, *(x.view(-1, size, *x.shape[2:]) for x in (k, v)))
        blocks = torch.arange(len(cache.k), dtype=torch.int32)
        if arrangement.scattered:
            blocks = blocks[torch.randperm(len(blocks), generator=random)]
        owners = blocks.view(len(k), -1)[:, : math.ceil(context / size)].to(device)  # [R, blocks of the context]
    lengths = torch.full((batch,), context, dtype=torch.int32, device=device)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
    parts = owners.reshape(-1, batch, *owners.shape[1:]).unbind()
    if size is None:
        return cache, [BatchView(lengths, starts, rows, None, context, 1) for rows in parts]
    return cache, [BatchView(lengths, starts, None, table, context, 1) for table in parts]
