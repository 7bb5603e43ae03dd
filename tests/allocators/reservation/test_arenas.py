"""The three arenas: what they give out tiles the pool, and what comes back is whole again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvarena.allocators.free_list import FreeList
from kvarena.allocators.paged.block_pool import BlockPool
from kvarena.allocators.policy import IntegrityError
from kvarena.allocators.reservation.best_fit import BestFitAllocator
from kvarena.allocators.reservation.buddy import BuddyAllocator, next_power_of_two

ARENAS = {
    "free list": (FreeList, lambda units: units),
    "block pool": (BlockPool, lambda units: units),
    "buddy": (lambda n: BuddyAllocator(n, 32), next_power_of_two),
    "best fit": (BestFitAllocator, lambda units: units),
}


@pytest.mark.parametrize("name", ARENAS)
@given(num_units=st.integers(1, 150), wishes=st.lists(st.tuples(st.booleans(), st.integers(0, 31)), max_size=60))
def test_random_programs_keep_an_arena_whole(name, num_units, wishes):
    make, rounded = ARENAS[name]
    arena = make(num_units)
    taken = []
    for give_back, number in wishes:
        if give_back and taken:
            arena.give(taken.pop(number % len(taken)))
        elif arena.fits(units := rounded(number + 1)):
            taken.append(arena.take(units))
        arena.check_integrity(taken)
    for place in taken:
        arena.give(place)
    arena.check_integrity([])
    assert arena.free_units == num_units
    assert arena.fits(arena.max_units)
    assert not arena.fits(arena.max_units + 1)


@pytest.mark.parametrize("name", ARENAS)
def test_a_double_free_is_found(name):
    make, _ = ARENAS[name]
    arena = make(64)
    kept, freed = arena.take(4), arena.take(8)
    arena.give(freed)
    arena.check_integrity([kept])
    arena.give(freed)
    with pytest.raises(IntegrityError):
        arena.check_integrity([kept])


@pytest.mark.parametrize("name", ARENAS)
def test_a_leak_is_found(name):
    make, _ = ARENAS[name]
    arena = make(64)
    arena.take(4)
    with pytest.raises(IntegrityError):
        arena.check_integrity([])


def test_free_list_is_last_in_first_out():
    free = FreeList(8)
    first, second = free.take(3), free.take(2)
    assert (first, second) == ([0, 1, 2], [3, 4])
    free.give(first)
    assert free.take(4) == [0, 1, 2, 5]


def test_buddy_carves_the_pool_of_opt_13b_greedily():
    """984 blocks = 7 x 128 + 64 + 16 + 8: the 88 that no request of Orca(Max) can use are 8.943 % (Fig 2)."""
    buddy = BuddyAllocator(984, 128)
    assert [size for _, size in buddy.free_chunks()] == [128] * 7 + [64, 16, 8]
    assert [start for start, _ in buddy.free_chunks()] == [*range(0, 896, 128), 896, 960, 976]


def test_buddy_takes_the_smallest_chunk_that_fits_and_splits_by_halves():
    buddy = BuddyAllocator(984, 128)
    assert buddy.take(8) == (976, 8)
    assert buddy.take(4) == (960, 4)  # the chunk of 16 becomes 4 + 4 + 8
    assert buddy.free_chunks()[-3:] == [(896, 64), (964, 4), (968, 8)]


def test_buddy_merges_with_its_buddy_alone():
    buddy = BuddyAllocator(16, 16)
    quarters = [buddy.take(4) for _ in range(4)]
    assert [start for start, _ in quarters] == [0, 4, 8, 12]
    buddy.give(quarters[1])
    buddy.give(quarters[2])
    assert buddy.free_chunks() == [(4, 4), (8, 4)]  # neighbours, but not buddies
    assert not buddy.fits(8)
    buddy.give(quarters[0])
    assert buddy.free_chunks() == [(0, 8), (8, 4)]


def test_buddy_gives_the_chunk_freed_last():
    buddy = BuddyAllocator(16, 4)
    chunks = [buddy.take(4) for _ in range(4)]
    buddy.give(chunks[2])
    buddy.give(chunks[0])
    assert buddy.take(4) == chunks[0]


def test_best_fit_takes_the_tightest_hole_and_coalesces():
    arena = BestFitAllocator(20)
    a, b, c, d = arena.take(6), arena.take(2), arena.take(4), arena.take(8)
    assert [a, b, c, d] == [(0, 6), (6, 2), (8, 4), (12, 8)]
    arena.give(a)
    arena.give(c)
    assert arena.take(3) == (8, 3)  # of the holes 6 and 4, the tighter
    assert not arena.fits(7)
    arena.give(b)
    assert arena.fits(8)  # 6 + 2
    assert arena.take(8) == (0, 8)


def test_blocks_are_free_when_the_last_table_drops_them():
    pool = BlockPool(8)
    table = pool.take(3)
    pool.share(table)
    pool.share(table[:1])
    pool.check_integrity([table, table, table[:1]])
    assert pool.drop(table) == []
    assert pool.drop(table) == table[1:]
    assert pool.free_units == 7
    assert not pool.is_shared(table[0])
    pool.check_integrity([table[:1]])
    assert pool.drop(table[:1]) == table[:1]
    pool.check_integrity([])
