"""What a prefix cache finds: Mooncake's counts, the policy's own cache, page-groups that straddle blocks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarena.allocators.kv_layout import attention_layout
from kvarena.allocators.paged import PagedPolicy
from kvarena.allocators.policy import Sequence
from kvarena.errors import UserError
from kvarena.harness.prefix_hits import Unit, count_hits, count_ids
from kvarena.harness.trace import TraceConfig, load_trace
from kvarena.harness.trace.block_ids import block_ids

BLOCK = Unit(512, 1)  # one byte a token


@pytest.fixture(scope="module")
def mooncake(shared):
    return load_trace(TraceConfig(path=str(shared("data/mooncake_synthetic.jsonl")), keep_hash_ids=True))


def test_mooncakes_synthetic_trace_without_a_limit(mooncake):
    assert sum(map(len, mooncake.hash_ids)) == 121_877
    assert count_ids(mooncake.hash_ids) == 77_953
    hits = count_hits(mooncake.hash_ids, mooncake.prompt_tokens, 512, BLOCK)
    assert hits.hit_tokens == 77_740 * 512


def policy_hits(ids, prompt_tokens, block_size, num_blocks, ids_of=512):
    """The paged policy's cache, each request admitted and released before the next."""
    layout = attention_layout(num_layers=1, num_kv_heads=1, head_size=1)
    policy = PagedPolicy(
        layout, num_blocks * block_size * layout.token_bytes, max_tokens=10**6, block_size=block_size, watermark=0,
        prefix_cache=True,
    )  # fmt: skip
    found = 0
    for i, (mine, tokens) in enumerate(zip(ids, prompt_tokens.tolist(), strict=True)):
        names = [(int(mine[j * block_size // ids_of]), j) for j in range(tokens // block_size)]
        hit = policy.admit_cached([Sequence(i, tokens, 1)], tokens, names)
        if hit is not None:
            found += hit
            policy.release(i)
    policy.check_integrity()
    return found


def test_the_policys_cache_finds_the_same(mooncake):
    """Without a limit: blocks of 256 on the whole trace, blocks of 64 on its beginning."""
    ids, prompts = mooncake.hash_ids, mooncake.prompt_tokens
    assert policy_hits(ids, prompts, 256, 130_000) == count_hits(ids, prompts, 512, Unit(256, 1)).hit_tokens
    few = count_hits(ids[:300], prompts[:300], 512, Unit(64, 1))
    assert policy_hits(ids[:300], prompts[:300], 64, 200_000) == few.hit_tokens > 0


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6)), min_size=1, max_size=25), st.integers(7, 20))
def test_the_policys_cache_finds_the_same_in_any_small_pool(turns, num_blocks):
    """Chats of whole blocks and a token more, so that a prompt's last block is never one that is found."""
    ids = tuple(np.append(100 * c + np.arange(blocks), -1 - i) for i, (c, blocks) in enumerate(turns))
    prompts = np.array([8 * blocks + 1 for _, blocks in turns])
    ours = count_hits(ids, prompts, 8, Unit(8, 1), num_blocks * 8)
    theirs = policy_hits(ids, prompts, 8, num_blocks + 1, ids_of=8)  # a block for the token more
    assert ours.hit_tokens <= theirs <= count_hits(ids, prompts, 8, Unit(8, 1)).hit_tokens


def test_a_page_group_is_found_only_where_all_of_it_is_the_same():
    """Stride 3 of page-groups of 8 bytes: group 0 ends in token 2, group 1 in token 5, group 2 in token 7."""
    unit = Unit(8, 3)
    assert [unit.end(j) for j in range(3)] == [3, 6, 8]
    assert [unit.whole(n) for n in (2, 3, 5, 6, 8)] == [0, 1, 1, 2, 3]
    same, other = np.array([1, 2]), np.array([1, 3])  # blocks of 4 tokens: tokens 0 to 3 are the same
    prompts = np.array([8, 8])
    assert count_hits((same, same), prompts, 4, unit).hit_tokens == 5  # two page-groups; the third has the last token
    assert count_hits((same, other), prompts, 4, unit).hit_tokens == 2  # the second reaches into the other block


def test_the_last_token_is_always_fed():
    ids = (np.array([1, 2]),) * 2
    assert count_hits(ids, np.array([8, 8]), 4, Unit(4, 1)).hit_tokens == 4
    assert count_hits(ids, np.array([9, 9]), 4, Unit(4, 1)).hit_tokens == 8
    assert count_ids(ids) == 2


def test_the_least_recently_used_goes_first():
    a, b, c = np.array([1, 2]), np.array([3, 4]), np.array([5, 6])
    prompts = np.full(4, 9)
    unit = Unit(4, 1)
    assert count_hits((a, b, a, b), prompts, 4, unit, 16).hit_tokens == 16
    assert count_hits((a, b, c, a), prompts, 4, unit, 16).hit_tokens == 0, "two prompts fit, a's was the older"
    assert count_hits((a, b, c, a), prompts, 4, unit, 20).hit_tokens == 4, "the end went before the beginning"


def test_a_prompt_larger_than_the_cache_leaves_it_as_it_was():
    a, big = np.array([1]), np.arange(10, 20)
    hits = count_hits((a, big, a), np.array([5, 41, 5]), 4, Unit(4, 1), 12)
    assert hits.hit_tokens == 4


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
