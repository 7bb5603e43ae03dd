"""What a prefix cache finds: Mooncake's counts, and the allocators' caches beside a cache of units by itself."""

from collections import OrderedDict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvarena.allocators.kv_layout import attention_layout
from kvarena.allocators.paged.policy import PagedConfig, PagedPolicy
from kvarena.allocators.vattention.policy import VAttentionConfig, VAttentionPolicy
from kvarena.errors import UserError
from kvarena.experiments.ours.prefix_hits import count_blocks, count_hits, count_ids
from kvarena.harness.requests.block_ids import block_ids
from kvarena.harness.trace import TraceConfig, load_trace

LAYOUT = attention_layout(num_layers=2, num_kv_heads=8, head_size=128)  # 64 KB hold 32 tokens of a layer
UNIT = 32


def lru_hits(ids, prompt_tokens, block_tokens, unit, limit=None):
    """Tokens that a cache of units finds which gives up the least recently used: of a prompt its end first.

    A prompt of more units than the cache holds is not kept.
    """
    kept, found = OrderedDict(), 0
    for mine, tokens in zip(ids, prompt_tokens.tolist(), strict=True):
        names = [(int(mine[((j + 1) * unit - 1) // block_tokens]), j) for j in range(tokens // unit)]
        hit = 0
        while hit < (tokens - 1) // unit and names[hit] in kept:
            hit += 1
        found += hit * unit
        if limit is None or len(names) <= limit:
            for name in reversed(names):
                kept[name] = None
                kept.move_to_end(name)
            while limit is not None and len(kept) > limit:
                kept.popitem(last=False)
    return found


def blocks(num_blocks, block_size):
    pool = num_blocks * block_size * LAYOUT.token_bytes
    return PagedPolicy(
        PagedConfig(block_size=block_size, watermark=0, prefix_cache=True), LAYOUT, pool, max_tokens=10**6
    )


def rows(tokens, **options):
    options = {"page_group": "64KB", "max_rows": 4000, "watermark": 0, "prefix_cache": True} | options
    return VAttentionPolicy(VAttentionConfig(**options), LAYOUT, tokens * LAYOUT.token_bytes, max_tokens=200_000)


def hits(policy, ids, prompt_tokens, block_tokens):
    found = count_hits(policy, ids, prompt_tokens, block_tokens)
    policy.check_integrity()
    return found


@pytest.fixture(scope="module")
def mooncake(data_file):
    """A trace in Mooncake's format, and whether it is Mooncake's own."""
    path = data_file("mooncake_synthetic.jsonl")
    trace = load_trace(TraceConfig(path=str(path), keep_hash_ids=True))
    return trace.hash_ids, trace.prompt_tokens


def test_the_blocks_of_a_trace_without_a_limit(mooncake):
    ids, prompts = mooncake
    distinct = len({block for mine in ids for block in mine.tolist()})
    whole = lru_hits(ids, prompts, 512, 512) // 512
    assert count_ids(ids) == sum(map(len, ids)) - distinct
    assert 0 < count_blocks(ids, prompts, 512) == whole <= count_ids(ids)
    if len(ids) == 3993:  # Mooncake's
        assert (sum(map(len, ids)), count_ids(ids), whole) == (121_877, 77_953, 77_740)


def test_the_allocators_caches_find_all_of_it(mooncake):
    """In a pool that holds all prompts side by side: blocks of 256 tokens, and page-groups of 512."""
    ids, prompts = mooncake
    of_blocks = hits(blocks(250_000, 256), ids, prompts, 512)
    assert of_blocks.hit_tokens == lru_hits(ids, prompts, 512, 256)
    large = rows(64_000_000, page_group="2MB", tensor_slicing=True)
    assert large.cache.unit_tokens == 512
    of_rows = hits(large, ids, prompts, 512)
    assert of_rows.hit_tokens == lru_hits(ids, prompts, 512, 512)
    assert of_blocks.refused == of_rows.refused == 0
    full = {
        block for mine, tokens in zip(ids, prompts.tolist(), strict=True) for block in mine[: tokens // 512].tolist()
    }
    assert of_rows.cached_bytes == len(full) * 512 * LAYOUT.token_bytes


def test_the_allocators_caches_on_its_beginning_in_a_small_pool(mooncake):
    """Rows go as a whole, so that a few tokens less are found than by a cache of units."""
    ids, prompts = (each[:600] for each in mooncake)
    distinct = 512 * len({block for mine in ids for block in mine.tolist()})
    units = distinct // 3 // 64
    model = lru_hits(ids, prompts, 512, 64, units)
    assert model < lru_hits(ids, prompts, 512, 64)
    assert hits(blocks(units, 64), ids, prompts, 512).hit_tokens == pytest.approx(model, rel=0.01)
    assert hits(rows(64 * units), ids, prompts, 512).hit_tokens == pytest.approx(model, rel=0.1)


CHATS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6)), min_size=1, max_size=25)


def chats(turns, unit):
    """Whole units and a token more, so that a prompt's last unit is never one that is found."""
    ids = tuple(np.append(100 * c + np.arange(count), -1 - i) for i, (c, count) in enumerate(turns))
    return ids, np.array([unit * count + 1 for _, count in turns])


@settings(max_examples=60)
@given(turns=CHATS, num_blocks=st.integers(7, 20))
def test_blocks_in_any_small_pool(turns, num_blocks):
    ids, prompts = chats(turns, 8)
    found = hits(blocks(num_blocks + 1, 8), ids, prompts, 8).hit_tokens  # a block for the token more
    assert lru_hits(ids, prompts, 8, 8, num_blocks) <= found <= lru_hits(ids, prompts, 8, 8)


@settings(max_examples=60)
@given(turns=CHATS, units=st.integers(7, 200))
@example(turns=[(0, 6), (1, 6), (0, 3), (2, 6), (1, 6), (0, 6)], units=14)
def test_rows_in_any_small_pool(turns, units):
    """Never more than there is to be found; all of it where all have room; and what was just served is still there."""
    ids, prompts = chats(turns, UNIT)
    found = hits(rows((units + 2) * UNIT), ids, prompts, UNIT).hit_tokens
    everything = lru_hits(ids, prompts, UNIT, UNIT)
    assert found <= everything
    if units >= sum(count for _, count in turns):
        assert found == everything
    again = [min(a, b) for (c, a), (d, b) in pairwise(turns) if c == d]
    assert found >= UNIT * sum(again)


def test_the_last_token_is_always_fed():
    ids = (np.array([1, 2]),) * 2
    assert hits(blocks(9, 4), ids, np.array([8, 8]), 4).hit_tokens == 4
    assert hits(blocks(9, 4), ids, np.array([9, 9]), 4).hit_tokens == 8
    assert count_blocks(ids, np.array([8, 8]), 4) == 1
    assert count_ids(ids) == 2


def test_the_least_recently_used_goes_first():
    a, b, c = np.array([1, 2]), np.array([3, 4]), np.array([5, 6])
    prompts = np.full(4, 9)
    assert hits(blocks(5, 4), (a, b, a, b), prompts, 4).hit_tokens == 16
    assert hits(blocks(5, 4), (a, b, c, a), prompts, 4).hit_tokens == 0, "two prompts fit, a's was the older"
    assert hits(blocks(6, 4), (a, b, c, a), prompts, 4).hit_tokens == 4, "the end went before the beginning"


def test_a_prompt_larger_than_the_pool_is_refused_and_leaves_it_as_it_was():
    a, big = np.array([1]), np.arange(10, 20)
    found = hits(blocks(3, 4), (a, big, a), np.array([5, 41, 5]), 4)
    assert (found.hit_tokens, found.refused) == (4, 1)


def test_an_allocator_without_a_cache_is_refused():
    policy = PagedPolicy(PagedConfig(), LAYOUT, 100 * LAYOUT.token_bytes, max_tokens=64)
    with pytest.raises(ValueError, match="paged keeps nothing"):
        count_hits(policy, (np.array([1]),), np.array([4]), 4)


def test_chats_share_what_they_said():
    trace = load_trace(TraceConfig(table="sharegpt_multiturn", num_requests=300), 4096)
    ids = block_ids(trace, 16)
    for before, after in zip(range(299), range(1, 300), strict=True):
        whole = trace.prompt_tokens[before] // 16
        same = trace.conversation_ids[before] == trace.conversation_ids[after]
        assert (ids[before][:whole].tolist() == ids[after][:whole].tolist()) == (same or whole == 0)
    assert [len(each) for each in ids] == (-(-trace.prompt_tokens // 16)).tolist()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (TraceConfig(table="sharegpt", num_requests=9), "neither hash_ids nor conversation_id"),
        (TraceConfig(table="sharegpt_multiturn", num_requests=9, cut_prompt=64), "shares no prefix"),
    ],
)
def test_traces_that_share_nothing(config, reason):
    with pytest.raises(UserError, match=reason):
        block_ids(load_trace(config, 2048))
