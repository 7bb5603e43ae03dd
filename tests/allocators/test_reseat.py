"""Beams that die and the children of others that take their seats: what is copied, mapped, or stays where it is."""

import pytest

from kvarena.allocators.actions import CopyBlock, CopyRow, Map, Unmap
from kvarena.allocators.forking import Forking
from kvarena.allocators.kv_layout import attention_layout
from kvarena.allocators.paged.policy import PagedConfig, PagedPolicy
from kvarena.allocators.policy import Admission, Sequence
from kvarena.allocators.sizes import KB
from kvarena.allocators.vattention.policy import VAttentionConfig, VAttentionPolicy

LAYOUT = attention_layout(2, 4, 64, "float32")  # 1 KB of K, and of V, a token in a layer: 64 tokens a page-group
PROMPT = 70  # a page-group and a part


def drained(policy):
    """What the policy would have done in a step that ends now."""
    actions = policy.drain()
    policy.look_ahead()
    return actions


def beams(policy, count=3, length=150):
    """Beams of one prompt that have parted: each has grown to `length` by itself."""
    seqs = [Sequence(i, PROMPT, 100) for i in range(count)]
    assert policy.admit(Admission(seqs, PROMPT)) is not None
    drained(policy)
    for seq in seqs:
        assert policy.grow(seq.seq_id, length - PROMPT)
    drained(policy)
    return seqs


def rows(**options):
    return VAttentionPolicy(
        VAttentionConfig(page_group="64KB", max_rows=4, **options), LAYOUT, 4 * 40 * 64 * KB, max_tokens=256
    )


@pytest.mark.parametrize("copy_beams", [False, True])
def test_a_child_whose_row_maps_all_that_it_shares_stays_there(copy_beams):
    policy = rows(copy_beams=copy_beams)
    seqs = beams(policy, length=100)  # they differ in the second page-group, which is not full
    row = policy.row(1)
    assert policy.sharing.reseat([(0, seqs[1])])
    assert policy.row(1) == row
    assert policy.grow_each([0, 1, 2]) == 3
    assert policy.drain() == [CopyRow(0, policy.row(0), row, 64 * KB, 100 * KB)]
    policy.check_integrity()


def test_page_groups_in_the_way_are_replaced_by_the_parents():
    policy = rows()
    seqs = beams(policy)  # the second page-group of each is full, and its own
    before = policy.sharing.shared_bytes
    assert policy.sharing.reseat([(0, seqs[1])])
    policy.grow_each([0, 1, 2])
    actions = policy.drain()
    assert [type(action) for action in actions] == [Unmap, Map, CopyRow]
    assert (actions[-1].start, actions[-1].stop) == (128 * KB, 150 * KB)
    assert policy.sharing.shared_bytes == before + 4 * 64 * KB
    policy.check_integrity()


def test_page_groups_in_the_way_are_written_over_where_beams_are_copied():
    policy = rows(copy_beams=True)
    seqs = beams(policy)
    before, row = policy.usage(), policy.row(1)
    assert policy.sharing.reseat([(0, seqs[1])])
    assert policy.usage() == before
    policy.grow_each([0, 1, 2])
    assert policy.drain() == [CopyRow(0, policy.row(0), row, 64 * KB, 150 * KB)]
    policy.check_integrity()


def test_page_groups_of_others_are_never_written_over():
    policy = rows()
    seqs = beams(policy)
    policy.sharing.reseat([(0, seqs[1])])  # 0 and 1 share their second page-group now
    policy.grow_each([0, 1, 2])
    drained(policy)
    policy.sharing.copy_beams = True
    shared = policy.sharing.shared_bytes
    assert policy.sharing.reseat([(2, seqs[1])])
    policy.grow_each([0, 1, 2])
    actions = policy.drain()
    assert Map in map(type, actions)
    assert policy.sharing.shared_bytes == shared  # 1 and 2 share theirs
    assert all(not isinstance(a, CopyRow) or a.start == 128 * KB for a in actions)
    policy.check_integrity()


def blocks():
    return PagedPolicy(PagedConfig(), LAYOUT, 40 * 16 * LAYOUT.token_bytes, max_tokens=256)


def test_blocks_of_the_dead_are_free_and_the_last_of_the_living_is_copied():
    policy = blocks()
    seqs = beams(policy, length=100)
    prompt = policy.block_table(0)[: PROMPT // 16]
    free = policy.free_units
    assert policy.sharing.reseat([(0, seqs[1]), (0, seqs[2])])
    assert policy.block_table(0) == policy.block_table(1) == policy.block_table(2)
    assert policy.block_table(1)[: len(prompt)] == prompt
    assert policy.free_units == free + 2 * 3  # their last three of seven blocks
    policy.check_integrity()
    assert policy.grow_each([0, 1, 2]) == 3
    last = policy.block_table(2)[-1]
    assert [(a.source == last, type(a)) for a in policy.drain()] == [(True, CopyBlock)] * 2
    policy.check_integrity()


def test_reseating_is_releasing_and_forking():
    """The books agree with those of the two operations that it stands for."""
    moved, forked = rows(), rows()
    for policy in (moved, forked):
        seqs = beams(policy)
    moves = [(2, seqs[0]), (2, seqs[1])]
    assert moved.sharing.reseat(moves)
    assert Forking.reseat(forked.sharing, moves)
    assert moved.usage() == forked.usage()
    assert moved.sharing.shared_bytes == forked.sharing.shared_bytes
    assert moved.grow_each([0, 1, 2]) == forked.grow_each([0, 1, 2]) == 3
    moved.check_integrity()
    assert moved.usage() == forked.usage()
