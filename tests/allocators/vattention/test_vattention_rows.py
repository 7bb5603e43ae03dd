"""Which row a request of vAttention gets, and in which order memory is taken back from rows."""

import pytest
from vattention_by_hand import PAIR, TOKENS, admit, counts, policy_of, rows_mapped

from kvarena.allocators.policy import Map, Unmap
from kvarena.allocators.vattention.policy import VAttentionPolicy


def with_idle_rows(*page_groups: int, **switches) -> VAttentionPolicy:
    """A policy whose rows 0, 1, ... were left with so many page-groups."""
    policy = policy_of(sum(page_groups) + 4, rows=len(page_groups), deferred_reclamation=True, **switches)
    for seq_id, count in enumerate(page_groups):
        admit(policy, 100 + seq_id, count)
    assert [policy.row(100 + i) for i in range(len(page_groups))] == list(range(len(page_groups)))
    for seq_id in range(len(page_groups)):
        policy.release(100 + seq_id)
    policy.drain()
    return policy


@pytest.mark.parametrize(
    ("left", "needed", "row", "maps"),
    [
        ((4, 1, 2, 3), 2, 2, 0),  # the least full that suffices
        ((4, 1, 2, 3), 3, 3, 0),
        ((4, 1, 2, 3), 5, 0, 1),  # none suffices: the fullest
        ((4, 0, 2, 3), 1, 2, 0),  # an empty row is no bargain
        ((2, 2, 2), 2, 0, 0),  # the first of equals
        ((2, 3, 3), 0, 1, 0),  # of unknown length: the fullest
    ],
)
def test_a_request_gets_the_row_that_fits_best(left, needed, row, maps):
    policy = with_idle_rows(*left)
    admit(policy, 0, needed)
    assert policy.row(0) == row
    assert counts(policy.drain()) == (maps, 0)


def test_of_idle_rows_the_least_full_gives_back_first():
    policy = with_idle_rows(3, 1, 2)  # and 4 page-groups are free
    admit(policy, 0, 8)  # in row 0
    assert [action.row for action in policy.drain() if isinstance(action, Unmap)] == [1]


def test_memory_is_taken_back_from_idle_rows_then_surplus_then_the_slot():
    policy = policy_of(page_groups=16, rows=6, deferred_reclamation=True, eager_allocation=True)
    admit(policy, 0, 4)  # becomes an idle row of 4
    admit(policy, 1, 5)  # its row is inherited by a short request: surplus of 3
    admit(policy, 2, 2)
    policy.release(1)
    admit(policy, 3, 2)
    policy.release(0)
    page_groups = rows_mapped(policy, policy.drain())
    policy.look_ahead()  # the idle row is the slot: 1 of its 4 page-groups is premapped
    idle, surplus, other = policy._reclamation.slot.index, policy.row(3), policy.row(2)
    assert page_groups == {idle: 4, surplus: 5, other: 2}
    assert policy.usage()._asdict().items() >= {"deferred": 3 * PAIR, "surplus": 3 * PAIR, "free": 5 * PAIR}.items()

    assert policy.grow(2, 6 * TOKENS)  # 5 are free: 1 from the idle row
    page_groups = rows_mapped(policy, policy.drain(), page_groups)
    assert page_groups == {idle: 3, surplus: 5, other: 8}
    assert policy.grow(2, 4 * TOKENS)  # the idle row's other 2, then 2 of the surplus
    page_groups = rows_mapped(policy, policy.drain(), page_groups)
    assert page_groups == {idle: 1, surplus: 3, other: 12}
    assert policy.grow(2, 2 * TOKENS)  # the last of the surplus, then the slot
    page_groups = rows_mapped(policy, policy.drain(), page_groups)
    assert page_groups == {idle: 0, surplus: 2, other: 14}
    assert not policy.grow(2)  # only now
    policy.check_integrity()


def test_what_was_mapped_for_the_next_iteration_is_taken_last():
    policy = policy_of(page_groups=6, rows=4, overlap=True)
    admit(policy, 0, 2, 4)
    admit(policy, 1, 2, 4)
    policy.drain()
    assert counts(policy.look_ahead()) == (2, 0)  # both are full
    policy.grow(0)
    assert policy.usage().free == 0
    assert admit(policy, 2, 1)  # at the cost of what 1 will need next
    assert [type(a) for a in policy.drain()] == [Unmap, Map]
    assert policy.tokens_until_growth(0) > 0
    assert policy.tokens_until_growth(1) == 0
    assert policy.look_ahead() == []  # 1 cannot be mapped ahead: not at the cost of others' next iteration
    policy.check_integrity()


def test_look_ahead_rather_gives_up_the_slot_than_what_another_row_needs_next():
    policy = policy_of(page_groups=6, rows=4, overlap=True, eager_allocation=True)
    admit(policy, 0, 2, 4)
    admit(policy, 1, 1, 4)
    policy.grow(1, TOKENS - 1)
    policy.drain()
    policy.look_ahead()  # 0 is full: a third page-group; the slot has the sixth
    assert (policy.tokens_until_growth(0), policy.usage().premapped) == (TOKENS, PAIR)
    policy.grow(1)
    assert [type(a) for a in policy.look_ahead()] == [Unmap, Map]
    assert (policy.tokens_until_growth(0), policy.tokens_until_growth(1)) == (TOKENS, TOKENS)
    assert policy.usage().premapped == 0


def with_surplus(policy: VAttentionPolicy, seq_id: int, page_groups: int, surplus: int) -> None:
    """Admit a sequence to a row that was left with `surplus` page-groups more than it needs."""
    admit(policy, 1000 + seq_id, page_groups + surplus)
    policy.release(1000 + seq_id)
    admit(policy, seq_id, page_groups, page_groups + surplus + 1)


def test_surplus_is_taken_from_the_latest_admitted_first():
    policy = policy_of(page_groups=7, deferred_reclamation=True)
    with_surplus(policy, 0, 1, 2)
    with_surplus(policy, 1, 1, 2)
    admit(policy, 2, 1)
    policy.drain()
    policy.grow(2)
    assert [(a.row, type(a)) for a in policy.drain()] == [(policy.row(1), Unmap), (policy.row(2), Map)]


def test_inherited_surplus_goes_before_what_a_later_row_needs_next():
    policy = policy_of(page_groups=6, deferred_reclamation=True, overlap=True)
    with_surplus(policy, 0, 1, 2)
    admit(policy, 1, 1, 3)
    admit(policy, 2, 1, 3)
    policy.grow(2, 0)
    policy.drain()
    policy.look_ahead()  # 1 and 2 are full: one page-group is free, the other comes from 0
    assert policy.tokens_until_growth(0) == TOKENS
    assert policy.grow(2, TOKENS + 1)  # one more than was mapped ahead
    assert [(a.row, type(a)) for a in policy.drain()] == [(policy.row(1), Unmap), (policy.row(2), Map)]
