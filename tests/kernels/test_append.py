"""Appending writes the new tokens where a kernel will look for them, and nothing else."""

import math

import pytest
import torch

from kvarena.kernels.append import append, append_torch
from kvarena.kernels.random_batch import Shapes
from kvarena.kernels.reference import gathered

LENGTHS = [1, 20, 256, 90]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("queries", [None, [1, 20, 100, 3]], ids=["decode", "prefill"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("write", [append, append_torch])
def test_new_tokens_are_found(arrange, arrangement, write, dtype, queries):
    batch = arrange(arrangement, Shapes(dtype=dtype), LENGTHS, queries)
    cache, view = batch.cache, batch.view
    old = [[gathered(x, view, b, length) for b, length in enumerate(LENGTHS)] for x in (cache.k, cache.v)]
    written = cache.k.isfinite().sum()
    new = torch.randn(2, len(batch.q), 2, cache.head_size, dtype=torch.float32).to(dtype)
    write(*new, cache, view)
    starts = view.query_starts.tolist()
    for x, before, added in zip((cache.k, cache.v), old, new, strict=True):
        for b, length in enumerate(LENGTHS):
            now, count = gathered(x, view, b, length), starts[b + 1] - starts[b]
            assert torch.equal(now[: length - count], before[b][: length - count])
            assert torch.equal(now[length - count :], added[starts[b] : starts[b + 1]].double())
    assert cache.k.isfinite().sum() == written  # the NaN around the sequences is untouched


def test_new_tokens_may_be_strided(arrange):
    batch = arrange("scattered blocks", Shapes(), LENGTHS)
    projection = torch.full((len(LENGTHS), 6, batch.cache.head_size), math.nan)
    projection[:, :4] = torch.arange(4 * len(LENGTHS), dtype=torch.float32).view(-1, 4, 1)
    append(projection[:, :2], projection[:, 2:4], batch.cache, batch.view)
    last = gathered(batch.cache.v, batch.view, 3, LENGTHS[3])[-1]
    assert last[:, 0].tolist() == [14, 15]
