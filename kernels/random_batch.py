"""Random batches in either layout, poisoned where no kernel may look: for tests and for validation on a GPU."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from kvarena.kernels.layout import Layout
from kvarena.kernels.view import BatchView, LayerCache


class Batch(NamedTuple):
    """The arguments of a kernel call, but for the output."""

    q: Tensor  # [T, Hq, D]
    cache: LayerCache
    view: BatchView


@dataclass(frozen=True, slots=True)
class Shapes:
    """What is the same for all batches of a test."""

    heads: int = 2  # KV heads
    group: int = 4  # query heads per KV head
    size: int = 16  # head size
    dtype: torch.dtype = torch.float32
    device: str = "cpu"


def random_batch(
    shapes: Shapes,
    lengths: Sequence[int],
    queries: Sequence[int] | None = None,
    block_size: int | None = None,
    shuffled: bool = True,
    seed: int = 0,
    padding: int = 0,
    filler: float = math.nan,
) -> Batch:
    """A batch of sequences of these lengths, whose last `queries` tokens (default: one) are asked about.

    Paged with a `block_size`, its blocks scattered or in order; else contiguous, `padding` tokens between two rows.
    The values depend on the seed alone, not on the layout. The filler stands in every place that holds no token, and
    is what block tables point to past the length.
    """
    random = torch.Generator().manual_seed(seed)
    counts = list(queries or [1] * len(lengths))
    tokens, heads, size = sum(lengths), shapes.heads, shapes.size

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(shapes.dtype).to(shapes.device)

    q, k, v = draw(sum(counts), heads * shapes.group, size), draw(tokens, heads, size), draw(tokens, heads, size)
    if block_size is None:
        place, where = _rows(lengths, padding, random)
    else:
        place, where = _blocks(lengths, block_size, shuffled, random)
    layout = Layout.CONTIGUOUS if block_size is None else Layout.PAGED
    view = BatchView(
        lengths=torch.tensor(lengths, dtype=torch.int32, device=shapes.device),
        query_starts=torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=shapes.device),
        rows=where.to(shapes.device) if block_size is None else None,
        block_table=where.to(shapes.device) if block_size is not None else None,
        max_length=max(lengths),
        max_queries=max(counts),
    )
    return Batch(q, LayerCache(layout, *(_placed(x, place, lengths, padding, filler) for x in (k, v))), view)


class _Place(NamedTuple):
    """Where tokens lie in a cache of `units` rows or blocks of `unit_tokens`."""

    units: int
    unit_tokens: int
    tables: list[list[int]]  # per sequence: its row, or its blocks


def _rows(lengths: Sequence[int], padding: int, random: torch.Generator) -> tuple[_Place, Tensor]:
    """One row per sequence, in random order, with a row that nobody owns."""
    rows = torch.randperm(len(lengths) + 1, generator=random)[: len(lengths)].to(torch.int32)
    return _Place(len(lengths) + 1, max(lengths) + padding, rows[:, None].tolist()), rows


def _blocks(lengths: Sequence[int], block_size: int, shuffled: bool, random: torch.Generator) -> tuple[_Place, Tensor]:
    """Blocks in order or scattered; block 0, or one of them, is nobody's, and fills the tables' ends."""
    needed = [math.ceil(length / block_size) for length in lengths]
    total = sum(needed) + 1
    blocks = (torch.randperm(total, generator=random) if shuffled else torch.arange(total)).tolist()
    nobody, ends = blocks[0], list(accumulate(needed, initial=1))
    tables = [blocks[start : start + count] for start, count in zip(ends, needed, strict=False)]
    width = max(needed) + 1
    padded = [[*table, *[nobody] * (width - len(table))] for table in tables]
    return _Place(total, block_size, tables), torch.tensor(padded, dtype=torch.int32)


def _placed(x: Tensor, place: _Place, lengths: Sequence[int], padding: int, filler: float) -> Tensor:
    """A cache that holds the tokens x [T, H, D] of all sequences, and the filler elsewhere."""
    cache = torch.full((place.units, place.unit_tokens, *x.shape[1:]), filler, dtype=x.dtype, device=x.device)
    for tokens, table in zip(torch.split(x, list(lengths)), place.tables, strict=True):
        for unit, run in zip(table, torch.split(tokens, place.unit_tokens), strict=True):
            cache[unit, : len(run)] = run
    return cache[:, : place.unit_tokens - padding]
