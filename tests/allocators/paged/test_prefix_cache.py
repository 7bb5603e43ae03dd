"""Blocks that are found again by what they hold."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarena.allocators.actions import Map, Unmap
from kvarena.allocators.kv_layout import attention_layout
from kvarena.allocators.paged.policy import PagedConfig, PagedPolicy
from kvarena.allocators.paged.prefix_cache import CachedBlockPool, block_names
from kvarena.allocators.policy import Admission, Sequence
from kvarena.allocators.registry import config_class, make_policy
from kvarena.allocators.sizes import KB
from kvarena.allocators.stores import make_store
from kvarena.allocators.testing.sharing_programs import Programs
from kvarena.allocators.vattention.policy import VAttentionConfig, VAttentionPolicy

LAYOUT = attention_layout(2, 4, 8)
TOKEN = LAYOUT.token_bytes


def cached(num_blocks=8, block_size=4):
    pool = num_blocks * block_size * TOKEN
    return PagedPolicy(
        PagedConfig(block_size=block_size, watermark=0.0, prefix_cache=True), LAYOUT, pool, max_tokens=2048
    )


def admit(policy, seq_id, tokens, output=4):
    """Admit a prompt of these token ids; returns how many were found."""
    return policy.admit(Admission([Sequence(seq_id, len(tokens), output)], len(tokens), names=block_names(tokens, 4)))


def test_equal_names_are_equal_prefixes():
    a, b = block_names([1, 2, 3, 4, 5, 6, 7], 3), block_names([9, 2, 3, 4, 5, 6], 3)
    assert len(a) == 2  # the last block is not full
    assert block_names([1, 2, 3, 4, 5, 6], 3) == a
    assert b[1] != a[1]  # the same tokens behind others
    assert block_names([1, 2, 3, 4, 5, 6], 3, salt="tenant")[0] != a[0]
    assert block_names([1, 2], 3) == []


def test_a_prompt_finds_the_full_blocks_of_another_and_shares_them():
    policy = cached()
    assert admit(policy, 0, list(range(10))) == 0
    assert admit(policy, 1, [*range(8), 99, 98]) == 8
    assert policy.block_table(0)[:2] == policy.block_table(1)[:2]
    assert policy.block_table(0)[2] != policy.block_table(1)[2]
    assert policy.usage().live == (8 + 2 + 2) * TOKEN
    assert policy.sharing.shared_bytes == 8 * TOKEN
    policy.check_integrity()


def test_the_last_token_is_never_found():
    """Its logits are wanted: of 8 tokens in 2 blocks one block is used (vLLM V1: at most n - 1)."""
    policy = cached()
    admit(policy, 0, list(range(8)))
    assert policy.cache.found_tokens(block_names(list(range(8)), 4), 8) == 4
    assert policy.cache.found_tokens(block_names(list(range(9)), 4), 9) == 8
    assert admit(policy, 1, list(range(8))) == 4


def test_what_was_freed_is_found_until_its_memory_is_needed():
    policy = cached()
    admit(policy, 0, list(range(10)))
    policy.release(0)
    usage = policy.usage()
    assert (usage.live, usage.cached, usage.free) == (0, 8 * TOKEN, 24 * TOKEN)
    assert policy.free_units == 8
    assert admit(policy, 1, list(range(10))) == 8
    assert policy.usage().cached == 0
    policy.release(1)
    policy.check_integrity()
    assert admit(policy, 2, [100 + i for i in range(32)]) == 0  # takes every block
    policy.release(2)
    assert policy.cache.found_tokens(block_names(list(range(10)), 4), 10) == 0
    policy.check_integrity()


def test_the_least_recently_used_goes_first_and_of_a_sequence_its_end():
    policy = cached()
    for seq_id, first in ((0, 0), (1, 50)):  # 3 full blocks each
        admit(policy, seq_id, list(range(first, first + 12)))
    for seq_id in (0, 1):
        policy.release(seq_id)
    admit(policy, 2, list(range(200, 212)))  # 2 blocks were never used, so one name goes
    names = {first: block_names(list(range(first, first + 13)), 4) for first in (0, 50)}
    assert policy.cache.found_tokens(names[0], 13) == 8
    assert policy.cache.found_tokens(names[50], 13) == 12


def test_what_is_found_is_not_taken_for_the_rest():
    """The only free blocks are the two that are found, and a third."""
    policy = cached(num_blocks=3)
    admit(policy, 0, list(range(8)), output=0)
    policy.release(0)
    assert admit(policy, 1, list(range(12)), output=0) == 8
    assert len(set(policy.block_table(1))) == 3
    policy.check_integrity()


def test_a_refusal_changes_nothing():
    policy = cached(num_blocks=3)
    admit(policy, 0, list(range(8)))
    names, before = block_names(list(range(16)), 4), policy.usage()
    assert not policy.can_admit(Admission([Sequence(1, 16, 0)], 16, names=names))
    assert policy.admit(Admission([Sequence(1, 16, 0)], 16, names=names)) is None
    assert policy.usage() == before
    policy.check_integrity()


def test_blocks_that_were_filled_since_are_found_once_named():
    """A chat: the answer is part of the next prompt."""
    policy, tokens = cached(), list(range(9))
    admit(policy, 0, tokens[:6])
    assert policy.grow(0, 3)
    policy.cache.keep(0, block_names(tokens, 4))
    policy.release(0)
    assert admit(policy, 1, [*tokens, 77]) == 8


def test_a_pool_without_a_cache_finds_nothing():
    policy = PagedPolicy(PagedConfig(block_size=4), LAYOUT, 8 * 4 * TOKEN, max_tokens=64)
    assert policy.admit(Admission([Sequence(0, 8, 0)], 8, names=block_names(list(range(8)), 4))) == 0
    assert policy.cache is None
    assert policy.admit(Admission([Sequence(1, 8, 0)], 8, names=block_names(list(range(8)), 4))) == 0
    assert policy.usage().cached == policy.sharing.shared_bytes == 0


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 14), st.integers(0, 6), st.booleans()), min_size=1, max_size=25
    )
)
def test_random_programs(operations):
    """Prompts of four families come, grow and go: what is found holds what the prompt begins with."""
    policy = cached(num_blocks=12)
    holds: dict[int, tuple[int, ...]] = {}  # block -> family, tokens up to its end
    resident: list[int] = []
    for seq_id, (family, length, grow, release) in enumerate(operations):
        tokens = [family * 100 + i for i in range(length)]
        found = admit(policy, seq_id, tokens, output=10)
        if found is not None:
            table = policy.block_table(seq_id)
            assert found < length
            assert all(holds[table[i]] == (family, i) for i in range(found // 4))
            holds |= {table[i]: (family, i) for i in range(found // 4, len(table))}
            resident.append(seq_id)
            if policy.grow(seq_id, grow):
                holds |= {block: (-seq_id - 1, 0) for block in policy.block_table(seq_id)[length // 4 + 1 :]}
        if release and resident:
            policy.release(resident.pop(0))
        policy.check_integrity()


def test_two_blocks_with_one_name():
    pool = CachedBlockPool(4)
    first, second = pool.take(1), pool.take(1)
    pool.name(first, ["a"])
    pool.name(second, ["a"])
    pool.drop(second)
    assert pool.find(["a", "b"]) == first
    assert pool.num_cached == 0
    pool.check_integrity([first])


# ---- page-groups -----------------------------------------------------------------------------------------------

LAYERS, HEADS, SIZE, MAX_TOKENS = 2, 4, 64, 160
UNIT = 32  # tokens that fill a page-group of 64 KB over both layers


def rows_of(page_groups=40, **options):
    layout = attention_layout(LAYERS, HEADS, SIZE, "float32")
    switches = {"page_group": "64KB", "max_rows": 6, "watermark": 0.0, "tensor_slicing": True, "prefix_cache": True}
    return VAttentionPolicy(
        VAttentionConfig(**switches | options), layout, page_groups * 2 * 64 * KB, max_tokens=MAX_TOKENS
    )


def admit_row(policy, seq_id, tokens, output=9):
    names = block_names(tokens, UNIT)
    found = policy.admit(Admission([Sequence(seq_id, len(tokens), output)], len(tokens), names=names))
    policy.check_integrity()
    return found


def test_a_unit_fills_whole_page_groups():
    assert rows_of().cache.unit_tokens == UNIT
    straddling = VAttentionPolicy(
        VAttentionConfig(page_group="64KB", prefix_cache=True),
        attention_layout(2, 3, 100),
        400 * 64 * KB,
        max_tokens=4096,
    )
    assert straddling.cache.unit_tokens * 600 % (64 * KB) == 0  # 600 bytes of K, and of V, a token in a layer
    assert straddling.cache.unit_tokens == 8192


def test_a_prompt_that_goes_on_takes_the_row_over():
    policy, tokens = rows_of(), list(range(70))
    assert admit_row(policy, 0, tokens) == 0
    row = policy.row(0)
    policy.drain()
    policy.release(0)
    policy.check_integrity()
    assert policy.usage().cached == 2 * 2 * 64 * KB
    assert policy.usage().live == 0
    assert admit_row(policy, 1, [*range(64), *range(200, 240)]) == 64
    assert policy.row(1) == row
    assert [action.ordinal for action in policy.drain() if isinstance(action, Map)] == [3]
    assert policy.usage().cached == 0


def test_a_prompt_that_branches_off_maps_what_it_shares():
    policy = rows_of(eager_allocation=False)
    admit_row(policy, 0, list(range(100)))
    policy.release(0)
    policy.drain()
    assert admit_row(policy, 1, [*range(64), *range(300, 310)]) == 64
    maps = [(action.ordinal, action.page_group) for action in policy.drain() if isinstance(action, Map)]
    assert maps[:2] == [(0, 0), (1, 1)]
    assert policy.usage().cached == 2 * 64 * KB  # the third unit, which nobody else holds
    assert policy.sharing.shared_bytes == 2 * 2 * 64 * KB
    assert policy.cache.found_tokens(block_names(list(range(100)), UNIT), 100) == 96  # still there
    assert admit_row(policy, 2, list(range(100))) == 96


def test_a_prompt_finds_what_a_running_sequence_holds():
    policy = rows_of()
    admit_row(policy, 0, list(range(70)))
    assert admit_row(policy, 1, list(range(70))) == 64
    assert policy.sharing.shared_bytes == 2 * 2 * 64 * KB
    policy.release(0)  # what it held is held by 1: nothing is kept
    policy.check_integrity()
    assert policy.usage().cached == 0


def test_kept_rows_go_when_memory_is_needed_the_oldest_first():
    policy = rows_of(page_groups=6, eager_allocation=False, reclaim_threshold=0.0)
    for seq_id, first in ((0, 0), (1, 500)):
        admit_row(policy, seq_id, list(range(first, first + 64)))
        policy.release(seq_id)
    assert admit_row(policy, 2, list(range(1000, 1096))) == 0  # three of six; two are free
    assert policy.cache.found_tokens(block_names(list(range(65)), UNIT), 65) == 0
    assert policy.cache.found_tokens(block_names(list(range(500, 565)), UNIT), 65) == 64
    assert policy.grow(2, 64)  # takes what the other has
    policy.check_integrity()
    assert policy.cache.found_tokens(block_names(list(range(500, 565)), UNIT), 65) == 0


def test_what_a_kept_row_gives_back_is_unmapped_also_where_copies_are_due():
    policy = rows_of(page_groups=6, eager_allocation=False, deferred_reclamation=False, overlap=False)
    admit_row(policy, 0, list(range(64)))
    row = policy.row(0)
    policy.release(0)
    assert policy.admit(Admission([Sequence(1, 10, 20), Sequence(2, 10, 20)], 10)) == 0
    policy.drain()
    assert policy.sharing.grow_gang([1, 2])  # the prompt is copied to the second
    assert policy.admit(Admission([Sequence(3, 96, 9)], 96)) == 0
    unmapped = [(action.row, action.ordinal) for action in policy.drain() if isinstance(action, Unmap)]
    assert unmapped == [(row, 1), (row, 0)]
    policy.check_integrity()


def test_kept_rows_go_when_rows_are_needed():
    policy = rows_of(max_rows=1)
    admit_row(policy, 0, list(range(70)))
    policy.release(0)
    assert policy.can_admit(Admission([Sequence(1, 10, 4)], 10))
    assert policy.admit(Admission([Sequence(1, 10, 4)], 10)) is not None
    policy.check_integrity()


SWITCHES = {
    "sliced": {},
    "plain": {"tensor_slicing": False},
    "reading past": {"read_past": 5},
    "at once": {"overlap": False, "deferred_reclamation": False, "eager_allocation": False},
    "few rows": {"max_rows": 2},
}


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=list(SWITCHES))
@settings(max_examples=25, deadline=None)
@given(
    operations=st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 110), st.integers(0, 110), st.integers(0, 40), st.integers(0, 2)),
        min_size=1,
        max_size=20,
    )
)
def test_random_programs_of_rows(switches, operations):
    """Prompts of three families, which agree up to somewhere, come, grow and go; the books are recounted all along."""
    policy = rows_of(**({"page_groups": 14} | switches))
    unit, served, resident = policy.cache.unit_tokens, [], []
    for seq_id, (family, length, agree, grow, releases) in enumerate(operations):
        tokens = [1000 * family + i + (500 if i >= agree else 0) for i in range(length)]
        before = policy.usage()
        found = policy.admit(Admission([Sequence(seq_id, length, 40)], length, names=block_names(tokens, unit)))
        policy.check_integrity()
        if found is None:
            assert policy.usage() == before
        else:
            assert found < length
            assert found == 0 or any(tokens[:found] == other[:found] for other in served)
            served.append(tokens)
            resident.append(seq_id)
            grown = grow * policy.grow(seq_id, grow)
            assert policy.length(seq_id) == length + grown
        policy.drain()
        policy.look_ahead()
        policy.check_integrity()
        assert policy.look_ahead() == []
        for _ in range(min(releases, len(resident))):
            policy.release(resident.pop(0))
            policy.check_integrity()
    for seq_id in resident:
        policy.release(seq_id)
    policy.drain()
    policy.look_ahead()
    policy.check_integrity()
    usage = policy.usage()
    assert usage.live == usage.reserved == usage.surplus == 0


def test_what_a_row_at_rest_does_not_hold_is_given_back_in_the_background():
    policy = rows_of(eager_allocation=False)
    admit_row(policy, 0, list(range(40)))  # a unit of 32 tokens, and 8 more
    policy.grow(0, 60)
    policy.drain()
    policy.look_ahead()
    policy.release(0)
    assert policy.usage().surplus == 3 * 2 * 64 * KB  # for the 68 tokens that nobody can find
    assert [action.ordinal for action in policy.look_ahead()] == [3, 2, 1]
    usage = policy.usage()
    assert (usage.cached, usage.surplus) == (2 * 64 * KB, 0)
    policy.check_integrity()


def test_room_for_the_next_token_is_made_beside_this_step():
    """The pool is full of what is kept; a row that is full gets its next page-group before it needs it."""
    policy = rows_of(page_groups=5, eager_allocation=False, reclaim_threshold=0.0)
    for seq_id, tokens in ((0, 64), (1, 32)):
        admit_row(policy, seq_id, list(range(1000 * seq_id, 1000 * seq_id + tokens)))
        policy.release(seq_id)
    policy.look_ahead()
    assert admit_row(policy, 2, list(range(5000, 5063)), output=40) == 0  # the two that are left
    policy.drain()
    assert policy.look_ahead() == []
    assert policy.grow(2)
    assert policy.drain() == []
    ahead = policy.look_ahead()  # 64 tokens: the row is full
    assert [action.ordinal for action in ahead if isinstance(action, Map)] == [2]
    assert policy.cache.found_tokens(block_names(list(range(65)), UNIT), 65) == 0, "the oldest went"
    assert policy.cache.found_tokens(block_names(list(range(1000, 1033)), UNIT), 33) == 32
    policy.grow(2)
    assert policy.drain() == []
    policy.check_integrity()


OPTIONS = {
    "paged": {"block_size": 4, "watermark": 0.0},
    "vattention": {"page_group": "64KB", "max_rows": 5, "watermark": 0.0, "tensor_slicing": True},
}


@pytest.mark.parametrize("name", OPTIONS)
@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 110), st.integers(0, 110), st.integers(1, 3), st.integers(0, 3)),
        min_size=1,
        max_size=14,
    )
)
def test_what_is_found_is_what_was_written(name, operations):
    """Prompts of three families, which agree up to somewhere, on real memory; every position keeps its tag."""
    layout = attention_layout(LAYERS, HEADS, SIZE, "float32")
    config = config_class(name)(name=name, prefix_cache=True, **OPTIONS[name])
    policy = make_policy(config, layout, 1400 * KB, MAX_TOKENS)
    store = make_store(policy, LAYERS, HEADS, SIZE, "float32")
    unit = 4 if name == "paged" else UNIT
    programs, resident = Programs(policy, store, LAYERS), []
    for family, length, agree, members, releases in operations:
        ids = [programs.next_id + i for i in range(members)]
        tokens = [1000 * family + i + (500 if i >= agree else 0) for i in range(length)]
        names, seqs = block_names(tokens, unit), [Sequence(i, length, 20) for i in ids]
        asked = Admission(seqs, length, names=names)
        expected, before = policy.can_admit(asked), policy.usage()
        found = policy.admit(asked)
        assert (found is not None) == expected
        policy.check_integrity()
        if found is None:
            assert policy.usage() == before
            assert resident or policy.refusal(asked)
        else:
            assert found < length
            programs.next_id += members
            programs.tags |= {i: tokens.copy() for i in ids}
            programs.unwritten[ids[0]] = found
            resident.append(ids)
            programs.step(min)
            programs.check(ids[0])
            if policy.sharing.grow_gang(ids):
                for i in ids:
                    programs.unwritten[i] = length
                    programs.tags[i] += programs.new_tags(1)
                programs.step(min)
                for i in ids:
                    programs.check(i)
        for _ in range(min(releases, len(resident))):
            programs.end(resident.pop(0))
            policy.check_integrity()
        programs.step(min)
        policy.check_integrity()
    for ids in resident:
        programs.check(ids[0])
        programs.end(ids)
    policy.check_integrity()
    assert policy.usage().live == 0
    store.close()
