"""Arithmetic of rows: tables 8 and 10 of the vAttention paper, and what lies between two page-groups."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvarena.allocators.kv_layout import attention_layout, latent_layout, sliding_layout
from kvarena.allocators.sizes import KB, MB
from kvarena.allocators.vattention.page_groups import PAGE_GROUPS, RowGeometry, checked_page_group, row_geometries
from kvarena.errors import UserError

YI_6B = attention_layout(32, 4, 128)
LLAMA_3_8B = attention_layout(32, 8, 128)
YI_34B = attention_layout(60, 8, 128)


@pytest.mark.parametrize(
    ("layout", "tokens"),
    [(YI_6B, (64, 128, 256, 2048)), (LLAMA_3_8B, (32, 64, 128, 1024)), (YI_34B, (32, 64, 128, 1024))],
)
def test_tokens_per_page_group_of_table_8(layout, tokens):
    sizes = [row_geometries(layout, size, False)[0] for size in PAGE_GROUPS]
    assert tuple(g.tokens_in(1, 10**6) for g in sizes) == tokens
    assert {g.num_tensors for g in sizes} == {2 * layout.groups[0].num_layers}


@pytest.mark.parametrize(("layout", "tokens"), [(YI_6B, 64), (LLAMA_3_8B, 32), (YI_34B, 17)])
def test_tokens_per_sliced_page_group_of_table_10(layout, tokens):
    """The paper prints 18 for Yi-34B; 2 MB / (60 x 8 x 128 x 2 bytes) is 17.07."""
    [geometry] = row_geometries(layout, 2 * MB, True)
    assert (geometry.num_tensors, geometry.tokens_in(1, 10**6)) == (2, tokens)


def test_a_token_that_straddles_two_page_groups_needs_both():
    """17.07 tokens per page-group: the 35th token still begins in the second one's spare 0.07."""
    [geometry] = row_geometries(YI_34B, 2 * MB, True)
    assert [geometry.page_groups_for(n) for n in (0, 1, 17, 18, 34, 35)] == [0, 1, 1, 2, 2, 3]
    assert geometry.page_groups_for(17 * 15) == 15
    assert geometry.page_groups_for(256) == 15  # 15 x 17.07 = 256: rounding tokens down would take a 16th


def test_a_window_is_a_ring():
    _, sliding = row_geometries(sliding_layout(1, 3, 1000, 8, 64), 64 * KB, False)
    full_ring = -(-1000 * 1024 // (64 * KB))
    assert [sliding.page_groups_for(n) for n in (64, 65, 1000, 10**6)] == [1, 2, full_ring, full_ring]
    assert sliding.tokens_in(full_ring, 5000) == 5000
    assert sliding.tokens_in(full_ring - 1, 5000) == (full_ring - 1) * 64
    assert sliding.row_bytes(10**6) == full_ring * 64 * KB


def test_a_latent_layer_has_one_tensor():
    layout = latent_layout(27, 576)
    assert row_geometries(layout, 2 * MB, False)[0].num_tensors == 27
    assert row_geometries(layout, 2 * MB, True)[0].num_tensors == 1


@given(
    stride=st.integers(1, 300_000),
    size=st.sampled_from(PAGE_GROUPS),
    length=st.integers(0, 20_000),
    window=st.none() | st.integers(1, 20_000),
)
def test_page_groups_and_tokens_are_inverse(stride, size, length, window):
    geometry = RowGeometry(2, stride, size, window)
    page_groups = geometry.page_groups_for(length)
    assert geometry.tokens_in(page_groups, 20_000) >= length
    assert page_groups == 0 or geometry.tokens_in(page_groups - 1, 20_000) < length
    assert geometry.row_bytes(20_000) >= page_groups * size
    assert geometry.row_bytes(20_000) % size == 0


@pytest.mark.parametrize("size", [0, 4096, "32KB", "512KB", "3MB"])
def test_other_page_groups_are_refused_with_those_there_are(size):
    with pytest.raises(UserError, match=r"There are: 64KB, 128KB, 256KB, 2MB"):
        checked_page_group(size)
