"""Our Triton kernels, in Triton's interpreter. Run by `test_triton_interpreter.py`, with TRITON_INTERPRET=1 set.

The interpreter's `tl.dot` is wrong for bfloat16 (Triton 3.6, 3.7), hence float32 and float16 here.
"""

import dataclasses

import pytest
import torch

from kvarena.kernels.append import append_torch
from kvarena.kernels.random_batch import Batch, Shapes
from kvarena.kernels.reference import reference_attention
from kvarena.kernels.triton_append import append_triton
from kvarena.kernels.triton_attention import TritonAttention
from kvarena.kernels.triton_launch import Tiles

# Triton 3.6's interpreter, with a numpy that still allows it.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar")

LENGTHS = [1, 3, 16, 17, 33]  # around blocks, tiles and splits of 16
CHUNKS = [(1, 1), (18, 18), (40, 3), (17, 1)]  # length, its last queries


def assert_right(out: torch.Tensor, batch: Batch) -> None:
    bound = {torch.float32: 2e-6, torch.float16: 2e-3}[out.dtype]
    torch.testing.assert_close(out.double(), reference_attention(*batch), atol=bound, rtol=bound)


SHAPE = Tiles(ROWS=16, TILE=16, num_warps=4, num_stages=1)


@pytest.fixture
def kernel():
    """The kernel with small tiles and several splits."""
    return TritonAttention(SHAPE, split_tokens=16)


def test_decode(arrangement, arrange, run, kernel):
    batch = arrange(arrangement, Shapes(heads=1), LENGTHS, block_size=4)
    assert_right(run(kernel, batch), batch)


def test_prefill(arrangement, arrange, run, kernel):
    batch = arrange(arrangement, Shapes(heads=1), *zip(*CHUNKS, strict=True), block_size=4)
    assert_right(run(kernel, batch), batch)


@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_block_sizes(block_size, arrange, run, kernel):
    """Smaller than a tile, equal, larger."""
    batch = arrange("scattered blocks", Shapes(heads=1), [34, 7], block_size=block_size)
    assert_right(run(kernel, batch), batch)


@pytest.mark.parametrize("group", [1, 7, 8, 17])
def test_groups_of_query_heads(group, arrange, run, kernel):
    for queries in ([1, 1], [3, 2]):
        batch = arrange("scattered blocks", Shapes(heads=2, group=group), [3, 18], queries)
        assert_right(run(kernel, batch), batch)


@pytest.mark.parametrize("queries", [[1, 1], [5, 18]], ids=["decode", "prefill"])
def test_layouts_are_one_body(queries, arrange, run, kernel):
    """The same tokens in another place: the same bits."""
    rows, blocks = (arrange(name, Shapes(heads=1), [5, 20], queries, 4) for name in ("rows", "scattered blocks"))
    assert torch.equal(run(kernel, rows), run(kernel, blocks))


@pytest.mark.parametrize("queries", [[1, 1], [1, 9]], ids=["decode", "prefill"])
def test_what_a_gpu_would_get(queries, arrange, run):
    """A head size that is served, tiles and splits as chosen: here one split, written without a merge."""
    for name in ("rows", "scattered blocks"):
        batch = arrange(name, Shapes(heads=1, size=64, dtype=torch.float16), [3, 45], queries)
        assert_right(run(TritonAttention(), batch), batch)


def test_many_splits_are_merged(arrange, run, kernel):
    """More than are merged at once, the last of them with the highest scores."""
    batch = arrange("rows", Shapes(heads=1, group=1), [300, 20])
    batch.cache.k[:, 256:] *= 4
    assert_right(run(kernel, batch), batch)


def test_k_and_v_may_lie_differently(arrange, run, kernel):
    """They are two tensors, each with strides of its own."""
    for name in ("rows", "scattered blocks"):
        batch = arrange(name, Shapes(heads=1), [20, 7])
        _, size, *token = batch.cache.v.shape
        spread = torch.full((batch.cache.v.shape[0], size + 3, *token), torch.nan)[:, :size].copy_(batch.cache.v)
        batch = batch._replace(cache=dataclasses.replace(batch.cache, v=spread))
        assert_right(run(kernel, batch), batch)


def test_a_sequence_may_outgrow_the_length_of_the_launch(arrange, run, kernel):
    """A CUDA graph replays the launch of a shorter batch."""
    batch = arrange("scattered blocks", Shapes(heads=1), [45, 20], block_size=4)
    short = dataclasses.replace(batch.view, max_length=20)
    assert_right(run(kernel, batch._replace(view=short)), batch)


def test_queries_and_outputs_may_lie_in_wider_rows(arrange, kernel):
    """As they do in the fused output of a projection."""
    batch = arrange("scattered blocks", Shapes(heads=1, group=2), [7, 12])
    wide = torch.full((2, 3, 2, 16), torch.nan)
    wide[:, 0] = batch.q
    kernel.decode(wide[:, 0], batch.cache, batch.view, wide[:, 2])
    assert_right(wide[:, 2], batch)
    assert wide[:, 1].isnan().all()


def test_append(arrangement, arrange):
    """As `append_torch` does, and nothing else is touched."""
    lengths, queries = zip(*CHUNKS, strict=True)
    batch = arrange(arrangement, Shapes(heads=3), lengths, queries, block_size=4)
    k_new, v_new = torch.randn(2, sum(queries), 3, 16)
    wanted, got = (arrange(arrangement, Shapes(heads=3), lengths, queries, block_size=4).cache for _ in range(2))
    append_torch(k_new, v_new, wanted, batch.view)
    append_triton(k_new, v_new, got, batch.view)
    for x, y in ((wanted.k, got.k), (wanted.v, got.v)):
        assert not torch.equal(x.nan_to_num(), batch.cache.k.nan_to_num())
        torch.testing.assert_close(y, x, rtol=0, atol=0, equal_nan=True)
