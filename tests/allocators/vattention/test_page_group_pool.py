import pytest

from kvarena.allocators.policy import IntegrityError
from kvarena.allocators.vattention.page_groups import PageGroupPool


def test_new_page_groups_ascend_and_returned_ones_come_first():
    pool = PageGroupPool(6)
    assert [pool.take(None) for _ in range(4)] == [0, 1, 2, 3]
    pool.give(1)
    pool.give(0)
    assert [pool.take(None) for _ in range(3)] == [0, 1, 4]
    assert len(pool) == 1


def test_the_follower_is_taken_wherever_it_is():
    pool = PageGroupPool(6)
    taken = [pool.take(None) for _ in range(4)]
    for each in taken[1:]:
        pool.give(each)
    assert pool.take(after=0) == 1  # given back first, yet the neighbour
    assert pool.take(after=3) == 4  # never used, yet the neighbour
    assert pool.take(after=4) == 5
    assert pool.take(after=5) == 3  # no follower: the last one given back


def test_taking_too_many_and_giving_twice_are_found():
    pool = PageGroupPool(2)
    pool.take(None), pool.take(None)
    with pytest.raises(IntegrityError, match="none of 2"):
        pool.take(None)
    pool.give(1)
    for each in (1, 7, -1):
        with pytest.raises(IntegrityError, match=f"page-group {each} was given back"):
            pool.give(each)


@pytest.mark.parametrize("owned", [[0], [0, 1, 1], [0, 1, 2, 3], [0, 1, 3]])
def test_a_recount_finds_leaks_and_double_use(owned):
    pool = PageGroupPool(4)
    for _ in range(3):
        pool.take(None)
    pool.check_integrity([0, 2, 1])
    with pytest.raises(IntegrityError, match="page-groups in rows"):
        pool.check_integrity(owned)
