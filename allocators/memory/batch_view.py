"""Small tensors of a batch view, made on the host once a step (through numpy: a fifth of `torch.tensor`'s time)."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
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
    return BatchView(
        lengths=_tensor(lengths, np.int32),
        query_starts=_decode_starts(len(lengths)) if max_queries == 1 else _starts(num_queries),
        rows=None if rows is None else _tensor(rows, np.int32),
        block_table=block_table,
        max_length=max(lengths),
        max_queries=max_queries,
    )


@lru_cache(maxsize=1024)
def _decode_starts(batch_size: int) -> Tensor:
    return torch.arange(batch_size + 1, dtype=torch.int32)


def _starts(num_queries: Sequence[int]) -> Tensor:
    return _tensor([0, *accumulate(num_queries)], np.int32)


def _tensor(values: Sequence[int], dtype: type[np.integer[Any]]) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=dtype))
