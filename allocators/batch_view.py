"""Small tensors of a batch view, made on the host once a step."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from kvarena.kernels.view import BatchView


def make_view(
    lengths: Sequence[int],
    num_queries: Sequence[int],
    rows: Sequence[int] | None = None,
    block_table: Tensor | None = None,
) -> BatchView:
    """View of a batch; `rows` or `block_table` says where its K/V lie."""
    max_queries = max(num_queries)
    if max_queries == 1:
        starts = _decode_starts(len(num_queries))
    else:
        starts = torch.tensor([0, *accumulate(num_queries)], dtype=torch.int32)
    return BatchView(
        lengths=torch.tensor(lengths, dtype=torch.int32),
        query_starts=starts,
        rows=None if rows is None else torch.tensor(rows, dtype=torch.int64),
        block_table=block_table,
        max_length=max(lengths),
        max_queries=max_queries,
    )


@lru_cache(maxsize=1024)
def _decode_starts(batch_size: int) -> Tensor:
    return torch.arange(batch_size + 1, dtype=torch.int32)
