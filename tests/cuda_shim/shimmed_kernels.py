"""Kernels over rows of which the first has no memory: nobody may ask for a tensor's base, nor read what is not mapped.

Run by `test_cuda_shim.py`, over the shim. A read past what is mapped would be the end of the process.
"""

import pytest
import torch
from torch_on_shim import SHIM, launches

from kvarena.allocators.actions import CopyRow, Map
from kvarena.allocators.kv_layout import attention_layout
from kvarena.allocators.registry import config_class, make_policy
from kvarena.allocators.sizes import KB, MB
from kvarena.allocators.stores import make_store
from kvarena.allocators.vattention.store import VirtualStore
from kvarena.kernels.append import append
from kvarena.kernels.reference import reference_attention
from kvarena.kernels.registry import get_kernel
from kvarena.kernels.triton_append import write_tokens
from kvarena.kernels.view import BatchView

pytestmark = pytest.mark.gpu  # chosen with the others

LAYERS, HEADS, SIZE, TOKENS = 2, 1, 16, 2048  # 64 bytes of K a token: 1,024 tokens fill a page-group
ROW, LENGTH, OTHER = 1, 5, 2


@pytest.fixture
def store():
    """Row 1 is mapped, alone: one page-group in each tensor."""
    SHIM.sizes(granularity=64 * KB)
    config = config_class("vattention")(name="vattention", page_group="64KB", max_rows=4)
    policy = make_policy(config, attention_layout(LAYERS, HEADS, SIZE, "float32"), MB, TOKENS)
    store = make_store(policy, LAYERS, HEADS, SIZE, "float32", "cuda")
    store.apply([Map(0, ROW, 0, 0)])
    yield store
    store.close()
    SHIM.sizes()


def written(store: VirtualStore, queries: int) -> BatchView:
    """A view of the row, after its first tokens and then its last ones were appended."""
    for count, length in ((LENGTH - queries, LENGTH - queries), (queries, LENGTH)):
        if count:
            view = store._make_view([length], [count], rows=[ROW])
            append(*torch.randn(2, count, HEADS, SIZE), store.layer(1), view)
    return view


@pytest.mark.parametrize("name", ["triton", "sdpa"])
@pytest.mark.parametrize("queries", [1, 3])
def test_what_is_mapped_is_written_and_read(store, name, queries):
    view, kernel = written(store, queries), get_kernel(name)
    q = torch.randn(queries, HEADS, SIZE)
    out = torch.empty_like(q)
    (kernel.decode if queries == 1 else kernel.prefill)(q, store.layer(1), view, out)
    expected = reference_attention(q, store.layer(1), view)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=2e-6)


def test_rows_are_copied(store):
    written(store, 1)
    store.apply([Map(0, OTHER, 0, 1), CopyRow(0, ROW, OTHER, 0, LENGTH * HEADS * SIZE * 4)])
    k = store.layer(1).k
    assert torch.equal(k[OTHER, :LENGTH], k[ROW, :LENGTH])
    assert k[ROW, :LENGTH].any()
    assert launches[-1] == "copy_pieces"


def test_a_tensor_whose_base_is_not_mapped_is_refused_as_tritons_launcher_does(store):
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        write_tokens[1, 1](store.layer(0).k)
    store.apply([Map(0, 0, 0, 1)])
    with pytest.raises(TypeError):  # by the driver it may be had; there are more arguments
        write_tokens[1, 1](store.layer(0).k)
