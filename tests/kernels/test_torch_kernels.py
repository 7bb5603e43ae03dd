"""The kernels that torch brings, against the formula."""

from shutil import which

import pytest
import torch

from kvarena.kernels.random_batch import Shapes
from kvarena.kernels.reference import reference_attention
from kvarena.kernels.torch.flex import FlexAttention
from kvarena.kernels.torch.gather_sdpa import GatherSDPAAttention
from kvarena.kernels.torch.sdpa import SDPAAttention

LENGTHS = [1, 16, 130, 300]
QUERIES = [1, 16, 130, 140]  # whole prompts, and the last chunk of one
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
both_calls = pytest.mark.parametrize("queries", [None, QUERIES], ids=["decode", "prefill"])
any_dtype = pytest.mark.parametrize("dtype", TOLERANCE)


@any_dtype
@both_calls
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("arrangement", ["rows", "padded rows", "sliced rows", "overlapping rows"])
def test_sdpa(arrange, run, arrangement, queries, dtype, group):
    batch = arrange(arrangement, Shapes(2, group, 32, dtype), LENGTHS, queries)
    assert (run(SDPAAttention(), batch) - reference_attention(*batch)).abs().max() < TOLERANCE[dtype]


@any_dtype
@both_calls
@pytest.mark.parametrize("block_size", [1, 3, 16, 128])
def test_gather_sdpa(arrange, run, block_size, queries, dtype):
    shapes = Shapes(size=32, dtype=dtype)
    batch = arrange("scattered blocks", shapes, LENGTHS, queries, block_size)
    out = run(GatherSDPAAttention(), batch)
    assert (out - reference_attention(*batch)).abs().max() < TOLERANCE[dtype]
    assert torch.equal(out, run(SDPAAttention(), arrange("rows", shapes, LENGTHS, queries)))


def finite(batch):
    """FlexAttention weighs what it must not see with zero instead of leaving it out: poison it, but not with NaN."""
    for x in (batch.cache.k, batch.cache.v):
        x.nan_to_num_(nan=1e4)
    return batch


@both_calls
@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_masks(arrange, run, block_size, queries):
    batch = finite(arrange("scattered blocks", Shapes(size=32), LENGTHS, queries, block_size))
    assert (run(FlexAttention(compiled=False), batch) - reference_attention(*batch)).abs().max() < 2e-6


@pytest.mark.skipif(which("g++") is None and which("clang++") is None, reason="FlexAttention compiles C++")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler imports what torch has deprecated
def test_flex_compiled(arrange, run):
    kernel = FlexAttention()
    for queries in (None, QUERIES):
        batch = finite(arrange("scattered blocks", Shapes(size=32), LENGTHS, queries))
        assert (run(kernel, batch) - reference_attention(*batch)).abs().max() < 2e-6
