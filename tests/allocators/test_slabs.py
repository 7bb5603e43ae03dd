import pytest

from kvarena.allocators.policy import IntegrityError
from kvarena.allocators.vattention.slabs import SlabList


def test_new_slabs_ascend_and_returned_ones_come_first():
    slabs = SlabList(6)
    assert [slabs.take(None) for _ in range(4)] == [0, 1, 2, 3]
    slabs.give(1)
    slabs.give(0)
    assert [slabs.take(None) for _ in range(3)] == [0, 1, 4]
    assert len(slabs) == 1


def test_the_follower_is_taken_wherever_it_is():
    slabs = SlabList(6)
    taken = [slabs.take(None) for _ in range(4)]
    for slab in taken[1:]:
        slabs.give(slab)
    assert slabs.take(after=0) == 1  # given back first, yet the neighbour
    assert slabs.take(after=3) == 4  # never used, yet the neighbour
    assert slabs.take(after=4) == 5
    assert slabs.take(after=5) == 3  # no follower: the last one given back


def test_taking_too_many_and_giving_twice_are_found():
    slabs = SlabList(2)
    slabs.take(None), slabs.take(None)
    with pytest.raises(IntegrityError, match="none of 2"):
        slabs.take(None)
    slabs.give(1)
    for slab in (1, 7, -1):
        with pytest.raises(IntegrityError, match=f"slab {slab} was given back"):
            slabs.give(slab)


@pytest.mark.parametrize("owned", [[0], [0, 1, 1], [0, 1, 2, 3], [0, 1, 3]])
def test_a_recount_finds_leaks_and_double_use(owned):
    slabs = SlabList(4)
    for _ in range(3):
        slabs.take(None)
    slabs.check_integrity([0, 2, 1])
    with pytest.raises(IntegrityError, match="slabs in rows"):
        slabs.check_integrity(owned)
