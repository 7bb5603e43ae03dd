"""The FlashInfer adapter, against a fake of its wrappers that computes attention from what `plan` was given."""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from kvarena.errors import UserError
from kvarena.kernels.libraries.flashinfer import FlashInferAttention, as_pages, page_table
from kvarena.kernels.random_batch import Shapes
from kvarena.kernels.reference import attend_sequence, reference_attention

SHAPES = Shapes(heads=2, group=2)
LENGTHS, QUERIES = [300, 7, 64, 1], [20, 7, 1, 1]


class FakeWrapper:
    """Either wrapper of FlashInfer; plans are kept for the test to see."""

    def __init__(self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, use_tensor_cores=False):
        assert kv_layout == "NHD"
        self.tensor_cores = use_tensor_cores
        self.plans = []

    def _plan(self, starts, indptr, indices, last_page_len, heads, page_size, types):
        for x in (starts, indptr, indices, last_page_len):
            assert x.dtype == torch.int32
            assert x.device.type == "cpu"
        assert indptr[-1] == len(indices)
        assert 1 <= last_page_len.min() <= last_page_len.max() <= page_size
        assert types["q_data_type"] == types["kv_data_type"] == torch.float32
        self.plans.append((starts, indptr, indices, last_page_len, page_size))
        self.heads = heads

    def run(self, q, paged_kv_cache, *, out):
        starts, indptr, indices, last_page_len, page_size = self.plans[-1]
        k, v = paged_kv_cache
        assert k.stride() == v.stride()
        assert (q.shape[1], *k.shape[1:]) == (self.heads[0], page_size, *self.heads[1:])
        for b, last in enumerate(last_page_len.tolist()):
            pages = indices[indptr[b] : indptr[b + 1]].long()
            length = (len(pages) - 1) * page_size + last
            both = (x[pages].flatten(0, 1)[:length].double() for x in (k, v))
            run = slice(starts[b], starts[b + 1])
            out[run] = attend_sequence(q[run].double(), *both)
        return out


class FakeDecode(FakeWrapper):
    def plan(self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, **types):
        starts = torch.arange(len(last_page_len) + 1, dtype=torch.int32)
        self._plan(starts, indptr, indices, last_page_len, (num_qo_heads, num_kv_heads, head_dim), page_size, types)


class FakePrefill(FakeWrapper):
    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads,
        head_dim_qk, page_size, causal=False, **types,
    ):  # fmt: skip
        assert causal
        heads = num_qo_heads, num_kv_heads, head_dim_qk
        self._plan(qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, heads, page_size, types)


@pytest.fixture
def kernel(monkeypatch):
    module = ModuleType("flashinfer")
    module.BatchDecodeWithPagedKVCacheWrapper = FakeDecode
    module.BatchPrefillWithPagedKVCacheWrapper = FakePrefill
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr("kvarena.kernels.libraries.flashinfer.WORKSPACE_BYTES", 1)
    return FlashInferAttention()


def assert_right(out, batch):
    torch.testing.assert_close(out.double(), reference_attention(*batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("queries", [None, QUERIES], ids=["decode", "prefill"])
def test_every_arrangement_is_read(arrangement, queries, arrange, run, kernel):
    batch = arrange(arrangement, SHAPES, LENGTHS, queries)
    assert_right(run(kernel, batch), batch)


def rows(num_rows, tokens, stride_tokens):
    """Rows of 2 heads of 4 elements, so many tokens apart."""
    buffer = torch.arange(((num_rows - 1) * stride_tokens + tokens) * 8, dtype=torch.float32)
    return buffer.as_strided((num_rows, tokens, 2, 4), (stride_tokens * 8, 8, 4, 1))


@pytest.mark.parametrize(
    ("tokens", "stride_tokens", "page_size"),
    [(512, 512, 256), (96, 512, 32), (512, 96, 32), (300, 512, 300), (96, 33, 96)],
    ids=["longest pages", "row is short", "rows overlap", "row has an odd length", "odd distance"],
)
def test_rows_are_cut_into_the_longest_pages(tokens, stride_tokens, page_size, arrange):
    """Rows a whole number of pages apart are pages in order; others are one page each."""
    cache, view = arrange("rows", SHAPES, [90, 33, 64])[1:]
    view = replace(view, rows=torch.tensor([2, 0, 1]))
    x = rows(3, tokens, stride_tokens)
    pages = as_pages(replace(cache, k=x, v=x))
    table = page_table(pages, view)
    assert pages.page_size == page_size
    assert pages.k.data_ptr() == x.data_ptr()
    for b, (row, length) in enumerate(zip([2, 0, 1], [90, 33, 64], strict=True)):
        indices = table.indices[table.indptr[b] : table.indptr[b + 1]].long()
        assert torch.equal(pages.k[indices].flatten(0, 1)[:length], x[row, :length])


def test_strides_that_flashinfer_cannot_take_are_refused(arrange):
    cache = arrange("rows", SHAPES, LENGTHS).cache
    with pytest.raises(UserError, match="same strides"):
        as_pages(replace(cache, v=rows(3, 100, 512)))
    far = torch.empty_strided((2, 33, 1, 1), (2**33, 2**27, 1, 1), device="meta")
    with pytest.raises(UserError, match="32 bits"):
        as_pages(replace(cache, k=far, v=far))


def test_layers_of_a_step_share_its_plan(arrange, run, kernel):
    batch = arrange("scattered blocks", SHAPES, LENGTHS)
    for _ in range(3):
        run(kernel, batch)
    (wrapper,) = kernel._wrappers.values()
    assert len(wrapper.plans) == 1
    run(kernel, batch._replace(view=replace(batch.view)))  # another step, with a view of its own
    assert len(wrapper.plans) == 2


@pytest.mark.parametrize(("group", "chosen", "used"), [(1, None, False), (4, None, True), (4, False, False)])
def test_tensor_cores_from_four_heads_on(group, chosen, used, arrange, run, kernel):
    kernel._tensor_cores = chosen
    run(kernel, arrange("rows", Shapes(group=group), [5]))
    (wrapper,) = kernel._wrappers.values()
    assert wrapper.tensor_cores is used
