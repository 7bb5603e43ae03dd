"""How the work of the Triton kernel is cut."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvarena.kernels.layout import Layout
from kvarena.kernels.triton_launch import (
    FEWEST_SPLIT_TOKENS,
    MOST_SPLIT_TOKENS,
    Work,
    alignment,
    cut_decode,
    cut_prefill,
    tiles,
)
from kvarena.kernels.view import LayerCache

H200 = 132  # multiprocessors

works = st.builds(
    Work,
    batch_size=st.integers(1, 512),
    heads=st.integers(1, 64),
    rows=st.integers(1, 2**17),
    max_length=st.integers(1, 2**20),
)


@given(works, st.sampled_from([64, 128, 256]), st.sampled_from([2, 4]), st.sampled_from([cut_decode, cut_prefill]))
def test_splits_cover_every_token_and_none_is_empty(work, size, item_bytes, choose):
    shape = tiles(size, item_bytes, work.rows)
    cut = choose(work, shape, H200)
    assert cut.split_tokens % shape.TILE == 0
    assert (cut.splits - 1) * cut.split_tokens < work.max_length <= cut.splits * cut.split_tokens
    assert cut.row_tiles * shape.ROWS >= work.rows
    assert cut.programs == cut.row_tiles * work.batch_size * work.heads


@given(works, st.sampled_from([64, 128, 256]))
def test_splits_are_neither_tiny_nor_long(work, size):
    shape = tiles(size, 2, work.rows)
    cut = cut_decode(work, shape, H200)
    assert cut.split_tokens < MOST_SPLIT_TOKENS + shape.TILE
    if cut.splits > 1:
        assert cut.split_tokens >= FEWEST_SPLIT_TOKENS


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_a_decode_of_long_sequences_fills_an_h200(batch_size):
    """Llama-3-8B's heads, 16K tokens: three programs fit on a multiprocessor."""
    cut = cut_decode(Work(batch_size, heads=8, rows=4, max_length=16384), tiles(128, 2, 4), H200)
    assert cut.programs * cut.splits >= 3 * H200


def test_a_prefill_splits_only_where_it_leaves_multiprocessors_idle():
    shape = tiles(128, 2, 4 * 512)
    full = cut_prefill(Work(4, heads=8, rows=4 * 512, max_length=16384), shape, H200)
    short = cut_prefill(Work(1, heads=4, rows=4 * 512, max_length=16384), shape, H200)
    assert full.splits == 1
    assert short.splits == 2


def test_tiles_shrink_with_heads_that_grow():
    assert [tiles(size, 2, 4).TILE for size in (16, 64, 128, 256)] == [128, 128, 64, 32]
    assert [tiles(128, 2, rows).ROWS for rows in (1, 16, 17, 64, 65)] == [16, 16, 64, 64, 128]


def test_no_more_is_said_of_addresses_than_holds_for_both():
    words = torch.zeros(64, dtype=torch.int16)
    shown = [words[first:][:16].view(1, 1, 1, 16) for first in (0, 1, 4, 8)]
    assert shown[0].data_ptr() % 16 == 0
    said = [alignment(LayerCache(Layout.CONTIGUOUS, shown[0], v)) for v in shown]
    assert said == [16, 2, 8, 16]
