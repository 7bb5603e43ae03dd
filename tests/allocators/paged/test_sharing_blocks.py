"""Sequences that hold the same blocks, and copy before they write: PagedAttention's Figs 8 and 9, and its CPU pool."""

import pytest
from sharing_cases import blocks_of, make

from kvarena.allocators.actions import CopyBlock, SwapIn, SwapOut
from kvarena.allocators.paged.block_pool import BlockPool
from kvarena.allocators.policy import Admission, IntegrityError, Sequence
from kvarena.allocators.sizes import KB


def test_beam_search_of_fig_9():
    """Width 4, blocks of 4 tokens, as the paper draws the tree:

        block 0 - block 2 - block 5                candidate 0
                - block 1 - block 3 - block 6      candidate 1
                                    - block 7      candidate 2
                          - block 4 - block 8      candidate 3

    The four likeliest come from candidates 1 and 2: 0 and 3 die, their blocks 2, 4, 5, 8 are free, and the new
    candidates take blocks 9 to 12.
    """
    policy = blocks_of(num_blocks=13)
    policy._pool._free.sort(reverse=True)  # block 0 is taken first
    table = policy.block_table
    assert policy.admit(Admission([Sequence(0, 4, 60)], 4)) is not None  # block 0
    assert policy.sharing.fork(0, Sequence(1, 4, 60))
    assert policy.grow(1, 4)  # block 1
    assert policy.grow(0, 4)  # block 2
    assert policy.sharing.fork(1, Sequence(3, 4, 60))
    assert policy.grow(1, 4)  # block 3
    assert policy.grow(3, 4)  # block 4
    assert policy.grow(0, 4)  # block 5
    assert policy.sharing.fork(1, Sequence(2, 4, 60))
    assert policy.grow(1, 4)  # block 6
    assert policy.grow(2, 4)  # block 7
    assert policy.grow(3, 4)  # block 8
    assert [table(i) for i in range(4)] == [[0, 2, 5], [0, 1, 3, 6], [0, 1, 3, 7], [0, 1, 4, 8]]
    assert policy.drain() == []  # all blocks are full, so nothing is copied
    assert policy.usage().live == 9 * 4 * policy.kv_layout.token_bytes
    held = set(range(9))
    for dead in (0, 3):
        policy.release(dead)
    assert held - set(table(1) + table(2)) == {2, 4, 5, 8}
    for parent, child in ((1, 4), (2, 5)):
        assert policy.sharing.fork(parent, Sequence(child, 4, 60))
    policy._pool._free.sort(reverse=True)
    policy._pool._free = [b for b in policy._pool._free if b < 9] + [12, 11, 10, 9]  # the figure takes new ones
    for candidate in (1, 4, 2, 5):
        assert policy.grow(candidate)
    assert [table(i)[-1] for i in (1, 4, 2, 5)] == [9, 10, 11, 12]
    assert [table(i)[:-1] for i in (1, 4, 2, 5)] == [[0, 1, 3, 6]] * 2 + [[0, 1, 3, 7]] * 2
    policy.check_integrity()


def test_two_samples_of_fig_8_admitted_as_a_group():
    policy = blocks_of(num_blocks=8)
    assert policy.admit(Admission([Sequence(1, 7, 2), Sequence(2, 7, 2)], 7)) is not None
    assert policy.block_table(1) == policy.block_table(2)
    assert policy.free_units == 6
    assert policy.sharing.grow_gang([1, 2])
    [copy] = policy.drain()
    assert isinstance(copy, CopyBlock)
    assert copy.target == policy.block_table(1)[1]  # the first to write copies
    assert copy.source == policy.block_table(2)[1]  # the last one writes in place
    assert policy.free_units == 5


@pytest.mark.parametrize("samples", [1, 2, 6])
def test_blocks_of_samples(samples):
    """Blocks of 4 tokens of 4 KB: those of the prompt once, then one for each."""
    policy, store = make("paged", {}, 1024 * KB)
    assert policy.admit(Admission([Sequence(i, 10, 20) for i in range(samples)], 10)) is not None
    assert policy.sharing.grow_gang(range(samples))
    held = policy.num_blocks - policy.free_units
    assert held == 2 + samples
    assert policy.sharing.shared_bytes == (samples - 1) * 2 * 4 * 4 * KB
    assert len(policy.drain()) == samples - 1
    assert store.physical().mapped_bytes == policy.pool_bytes  # resident from the start, whatever is held
    store.close()


def test_a_group_crosses_to_the_cpu_pool_once():
    policy = blocks_of(num_blocks=16, swap_bytes=1 << 20)
    ids = [0, 1, 2]
    assert policy.admit(Admission([Sequence(i, 10, 20) for i in ids], 10)) is not None
    assert policy.sharing.grow_gang(ids)
    policy.drain()
    tables = [list(policy.block_table(i)) for i in ids]
    policy.swapping.swap_out(ids)
    out = policy.drain()
    assert [type(action) for action in out] == [SwapOut] * 5  # two shared blocks, one of each member
    assert policy.free_units == 16
    assert policy.swapping.can_swap_in(ids)
    policy.swapping.swap_in(ids)
    back = policy.drain()
    assert [type(action) for action in back] == [SwapIn] * 5
    moved = {a.source: b.target for a, b in zip(out, back, strict=True)}
    assert [policy.block_table(i) for i in ids] == [[moved[block] for block in table] for table in tables]
    policy.check_integrity()


def test_members_that_share_their_last_block_share_it_again():
    policy = blocks_of(num_blocks=8, swap_bytes=1 << 20)
    policy.admit(Admission([Sequence(0, 6, 4), Sequence(1, 6, 4)], 6))
    policy.swapping.swap_out([0, 1])
    policy.check_integrity()
    policy.swapping.swap_in([0, 1])
    assert policy.block_table(0) == policy.block_table(1)
    policy.check_integrity()
    assert policy.sharing.grow_gang([0, 1])
    assert [type(a) for a in policy.drain()] == [SwapOut, SwapOut, SwapIn, SwapIn, CopyBlock]


def test_a_planted_double_free_is_found(monkeypatch):
    def drop_all(pool, blocks):
        pool.give(blocks)
        return blocks

    monkeypatch.setattr(BlockPool, "drop", drop_all)
    policy = blocks_of()
    policy.admit(Admission([Sequence(0, 6, 4), Sequence(1, 6, 4)], 6))
    policy.release(0)
    with pytest.raises(IntegrityError, match="free"):
        policy.check_integrity()


def test_copies_of_a_step_are_one_call(monkeypatch):
    policy, store = make("paged", {}, 4096 * KB)
    assert policy.admit(Admission([Sequence(i, 10, 4) for i in range(64)], 10)) is not None
    assert policy.sharing.grow_gang(range(64))
    calls = []
    monkeypatch.setattr(store._copy, "_copy", calls.append)
    store.apply(policy.drain())
    assert [len(runs.sizes) for runs in calls] == [63]
    store.close()
