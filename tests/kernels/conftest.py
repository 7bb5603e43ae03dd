"""Batches laid out in all the ways in which allocators lay them out."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvarena.kernels.kernel import AttentionKernel
from kvarena.kernels.random_batch import Batch, Shapes, random_batch
from kvarena.kernels.view import LayerCache

UNDEFINED = 2**31 - 1  # what a block table may hold past a sequence's length


def padded_rows(rows: Tensor) -> Tensor:
    """A row's stride is no multiple of a token's: vAttention rounds a row up to whole page-groups."""
    num_rows, tokens, heads, size = rows.shape
    stride = tokens * heads * size + 33
    buffer = torch.full((num_rows * stride,), math.nan, dtype=rows.dtype)
    return buffer.as_strided(rows.shape, (stride, heads * size, size, 1)).copy_(rows)


def sliced_rows(rows: Tensor) -> Tensor:
    """One layer of rows that hold every layer of a token: vAttention's tensor slicing."""
    num_rows, tokens, *token = rows.shape
    return torch.full((num_rows, tokens, 3, *token), math.nan, dtype=rows.dtype)[:, :, 1].copy_(rows)


def overlapping_rows(rows: Tensor) -> Tensor:
    """Rows begin at every token, and are everything from there on: a buddy allocator's, if its block is one token."""
    num_rows, tokens, heads, size = rows.shape
    return rows.contiguous().as_strided(
        ((num_rows - 1) * tokens + 1, tokens, heads, size), (heads * size, heads * size, size, 1)
    )


ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda rows: rows,
    "padded rows": padded_rows,
    "sliced rows": sliced_rows,
    "overlapping rows": overlapping_rows,
}
ARRANGEMENTS = (*ROWS, "ordered blocks", "scattered blocks")
Arrange = Callable[..., Batch]


@pytest.fixture(scope="session")
def arrange() -> Arrange:
    """A batch in one of ARRANGEMENTS; its values do not depend on which."""

    def make(
        arrangement: str,
        shapes: Shapes,
        lengths: Sequence[int],
        queries: Sequence[int] | None = None,
        block_size: int = 16,
    ) -> Batch:
        if arrangement.endswith("blocks"):
            batch = random_batch(shapes, lengths, queries, block_size, shuffled=arrangement == "scattered blocks")
            table = batch.view.block_table
            table[torch.arange(table.shape[1]) * block_size >= batch.view.lengths[:, None]] = UNDEFINED
            return batch
        q, cache, view = random_batch(shapes, lengths, queries, padding=3)
        caches = (ROWS[arrangement](x) for x in (cache.k, cache.v))
        if arrangement == "overlapping rows":
            view = replace(view, rows=view.rows * cache.k.shape[1])
        return Batch(q, LayerCache(cache.layout, *caches), view)

    return make


@pytest.fixture(params=ARRANGEMENTS)
def arrangement(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def run() -> Callable[[AttentionKernel, Batch], Tensor]:
    """A kernel's output; every element of it starts as NaN."""

    def call(kernel: AttentionKernel, batch: Batch) -> Tensor:
        out = torch.full_like(batch.q, math.nan)
        attend = kernel.decode if batch.view.is_decode else kernel.prefill
        attend(*batch, out)
        return out

    return call
