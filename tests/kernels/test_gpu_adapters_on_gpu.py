"""Every kernel of the GPU that this machine can run, against float64, in each layout that it reads."""

import dataclasses
import math

import pytest
import torch

from kvarena.kernels.append import append, append_torch
from kvarena.kernels.catalogue import CATALOGUE
from kvarena.kernels.kernel import AttentionKernel
from kvarena.kernels.random_batch import Batch, Shapes, random_batch
from kvarena.kernels.reference import reference_attention
from kvarena.kernels.registry import fits, get_kernel, kernel_spec, missing

pytestmark = pytest.mark.gpu

SHAPES = Shapes(heads=8, group=4, size=128, dtype=torch.bfloat16, device="cuda")
LENGTHS, QUERIES = [1, 255, 256, 1000, 4097], [1, 255, 3, 600, 129]
ARRANGEMENTS = {
    "row": {},
    "spread rows": {"padding": 64},
    "blocks in order": {"block_size": 16, "shuffled": False},
    "blocks": {"block_size": 16},
}
# Between rows, FlashAttention 3 reads on to the end of a tile: what is there must be finite.
READS_ON = {("fa3", "row"), ("fa3", "spread rows")}
GPU_KERNELS = [name for name, (spec, *_) in CATALOGUE.items() if "cuda" in spec.devices]


def batch_for(name: str, arrangement: str, queries: list[int] | None) -> Batch:
    """A batch in an arrangement, with the smallest blocks from 16 on that the kernel takes; skips what does not fit."""
    spec, where = kernel_spec(name), dict(ARRANGEMENTS[arrangement])
    if "block_size" in where and spec.block_sizes is not None:
        where["block_size"] = min(size for size in spec.block_sizes if size >= 16)
    filler = 1e4 if (name, arrangement) in READS_ON else math.nan
    batch = random_batch(SHAPES, LENGTHS, queries, filler=filler, **where)
    reason = fits(spec, batch.cache.layout, "cuda", "bfloat16", SHAPES.size, where.get("block_size"))
    if reason := missing(spec) or reason:
        pytest.skip(f"{name}: {reason}")
    return batch


def attended(kernel: AttentionKernel, batch: Batch) -> torch.Tensor:
    out = torch.full_like(batch.q, math.nan)
    (kernel.decode if batch.view.is_decode else kernel.prefill)(*batch, out)
    return out


def assert_right(out: torch.Tensor, batch: Batch) -> None:
    torch.testing.assert_close(out.double().cpu(), reference_attention(*batch), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("queries", [None, QUERIES], ids=["decode", "prefill"])
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("name", GPU_KERNELS)
def test_kernels_are_right(name, arrangement, queries):
    batch = batch_for(name, arrangement, queries)
    assert_right(attended(get_kernel(name), batch), batch)


@pytest.mark.parametrize("block_size", [1, 16, 256])
@pytest.mark.parametrize("queries", [None, QUERIES], ids=["decode", "prefill"])
def test_triton_is_one_body(queries, block_size):
    kernel = get_kernel("triton")
    rows, blocks = (random_batch(SHAPES, LENGTHS, queries, block_size=size) for size in (None, block_size))
    assert torch.equal(attended(kernel, rows), attended(kernel, blocks))


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("group", [1, 7, 8])
def test_triton_takes_many_shapes(size, dtype, group):
    for queries in (None, [1, 64, 200]):
        shapes = dataclasses.replace(SHAPES, size=size, dtype=dtype, group=group)
        batch = random_batch(shapes, [5, 64, 700], queries, block_size=16)
        assert_right(attended(get_kernel("triton"), batch), batch)


@pytest.mark.parametrize("name", [name for name in GPU_KERNELS if kernel_spec(name).in_graph])
@pytest.mark.parametrize("arrangement", ["row", "blocks"])
def test_a_decode_can_be_captured(name, arrangement):
    """A graph of one step serves the next: lengths grow in place, and the output follows."""
    batch = batch_for(name, arrangement, None)
    kernel, lengths = get_kernel(name), batch.view.lengths.clone()
    out = attended(kernel, batch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.decode(*batch, out)
    for shorter in (1, 0):
        batch.view.lengths.copy_((lengths - shorter).clamp(min=1))
        graph.replay()
        assert_right(out, batch)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_append_is_right_and_can_be_captured(arrangement):
    batches = [random_batch(SHAPES, LENGTHS, QUERIES, **ARRANGEMENTS[arrangement]) for _ in range(2)]
    k_new, v_new = torch.randn(2, sum(QUERIES), SHAPES.heads, SHAPES.size, device="cuda").bfloat16()
    append_torch(k_new, v_new, *batches[0][1:])
    append(k_new, v_new, *batches[1][1:])  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        append(k_new, v_new, *batches[1][1:])
    graph.replay()
    for wanted, got in zip(*((b.cache.k, b.cache.v) for b in batches), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
