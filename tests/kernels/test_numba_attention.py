"""The numba kernel against the formula, and its promise that an output depends on its own sequence alone."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarena.kernels import threads
from kvarena.kernels.numba_attention import NumbaAttention
from kvarena.kernels.random_batch import Shapes
from kvarena.kernels.reference import reference_attention

LENGTHS = [1, 3, 255, 256, 257, 700]
QUERIES = [1, 3, 17, 256, 40, 300]
# Of outputs of about 1: float32 rounds sums of hundreds of terms; bfloat16 rounds the result once, to 8 bits.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
KERNEL = NumbaAttention()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("queries", [None, QUERIES], ids=["decode", "prefill"])
def test_is_attention(arrange, run, arrangement, queries, dtype):
    batch = arrange(arrangement, Shapes(size=64, dtype=dtype), LENGTHS, queries)
    assert (run(KERNEL, batch) - reference_attention(*batch)).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("size", [16, 32, 64, 80, 128, 256])
@pytest.mark.parametrize(("heads", "group"), [(1, 1), (3, 2), (8, 4), (2, 8), (1, 7)])
@pytest.mark.parametrize("queries", [None, [1, 30]], ids=["decode", "prefill"])
def test_heads(arrange, run, heads, group, size, queries):
    batch = arrange("rows", Shapes(heads, group, size), [5, 300], queries)
    assert (run(KERNEL, batch) - reference_attention(*batch)).abs().max() < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("queries", [None, QUERIES], ids=["decode", "prefill"])
@pytest.mark.parametrize("block_size", [1, 3, 8, 16, 100, 128, 256])
def test_layouts_agree_bitwise(arrange, run, block_size, queries, dtype):
    shapes = Shapes(size=32, dtype=dtype)
    contiguous = run(KERNEL, arrange("rows", shapes, LENGTHS, queries))
    paged = run(KERNEL, arrange("scattered blocks", shapes, LENGTHS, queries, block_size))
    assert torch.equal(contiguous, paged)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 600), min_size=1, max_size=5), st.integers(1, 256), st.sampled_from([1, 3, 8]), st.data()
)
def test_any_batch(arrange, run, lengths, block_size, group, data):
    """Every sequence by itself gets the bits that it gets in company."""
    queries = [data.draw(st.integers(1, min(length, 40))) for length in lengths]
    batch = arrange("scattered blocks", Shapes(1, group, 32), lengths, queries, block_size)
    together = run(KERNEL, batch)
    assert (together - reference_attention(*batch)).abs().max() < TOLERANCE[torch.float32]
    view, starts = batch.view, batch.view.query_starts.tolist()
    for b, count in enumerate(queries):
        own = slice(starts[b], starts[b + 1])
        alone = replace(
            view,
            lengths=view.lengths[b : b + 1],
            query_starts=torch.tensor([0, count], dtype=torch.int32),
            block_table=view.block_table[b : b + 1],
            max_queries=count,
        )
        assert torch.equal(run(KERNEL, batch._replace(q=batch.q[own], view=alone)), together[own])


def test_decode_repeats_prefill(arrange, run):
    """Decoding a prompt token by token gives the bits of its prefill: recomputing a sequence changes nothing."""
    prompt = arrange("rows", Shapes(size=64), [300], [300])
    prefilled = run(KERNEL, prompt)
    for length in (1, 2, 16, 255, 256, 257, 300):
        view = replace(
            prompt.view,
            lengths=torch.tensor([length], dtype=torch.int32),
            query_starts=torch.tensor([0, 1], dtype=torch.int32),
            max_queries=1,
        )
        decoded = run(KERNEL, prompt._replace(q=prompt.q[length - 1 : length], view=view))
        assert torch.equal(decoded[0], prefilled[length - 1])


@pytest.mark.parametrize("queries", [None, QUERIES], ids=["decode", "prefill"])
def test_threads_change_nothing(arrange, run, monkeypatch, queries):
    batch = arrange("rows", Shapes(size=64), LENGTHS, queries)
    alone = run(KERNEL, batch)
    monkeypatch.setattr(threads, "compute_threads", lambda: 2)
    assert torch.equal(run(KERNEL, batch), alone)


def test_nan_in_valid_keys_is_not_hidden(arrange, run):
    """A corrupted block must show: NaN within a sequence's length reaches its output, and no other's."""
    batch = arrange("ordered blocks", Shapes(size=64), [40, 40])
    batch.cache.k[batch.view.block_table[0, 1], 3] = float("nan")
    out = run(KERNEL, batch)
    assert out[0].isnan().all()
    assert not out[1].isnan().any()


def test_queries_and_outputs_may_be_strided(arrange, run):
    """They are often slices of one projection."""
    batch = arrange("rows", Shapes(size=64), LENGTHS)
    wide = torch.zeros(len(LENGTHS), 3, *batch.q.shape[1:])
    wide[:, 1] = batch.q
    KERNEL.decode(wide[:, 1], batch.cache, batch.view, wide[:, 2])
    assert torch.equal(wide[:, 2], run(KERNEL, batch))
    assert not wide[:, 0].any()
