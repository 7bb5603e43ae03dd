"""Page-groups mapped in several rows of vAttention."""

import pytest
from sharing_cases import make, rows_of

from kvarena.allocators.actions import CopyRow, Map, Unmap
from kvarena.allocators.kv_layout import sliding_layout
from kvarena.allocators.policy import Admission, IntegrityError, Sequence
from kvarena.allocators.sizes import KB
from kvarena.allocators.vattention.policy import VAttentionConfig, VAttentionPolicy


@pytest.mark.parametrize("samples", [1, 2, 6])
@pytest.mark.parametrize("prompt", [31, 32, 70])
def test_mapped_bytes_of_samples(samples, prompt):
    """Sliced, 32 tokens a page-group in each of 2 tensors: whole ones below the prompt once, then one for each."""
    policy, store = make("vattention", {"tensor_slicing": True, "eager_allocation": False, "overlap": False}, 4096 * KB)
    assert policy.admit(Admission([Sequence(i, prompt, 20) for i in range(samples)], prompt)) is not None
    assert policy.sharing.grow_gang(range(samples))
    store.apply(policy.drain())
    store.apply_in_background(policy.look_ahead())
    shared = prompt // 32
    own = -(-(prompt + 1) // 32) - shared
    assert policy.mapped_bytes == store.physical().mapped_bytes == (shared + samples * own) * 2 * 64 * KB
    assert policy.sharing.shared_bytes == (samples - 1) * shared * 2 * 64 * KB
    policy.check_integrity()
    store.close()


def test_a_fork_maps_whole_page_groups_and_copies_the_rest():
    policy = rows_of(eager_allocation=False)
    assert policy.admit(Admission([Sequence(0, 70, 20)], 70)) is not None
    policy.drain()
    assert policy.sharing.fork(0, Sequence(1, 70, 20))
    parent, child = policy.row(0), policy.row(1)
    maps = policy.drain()
    assert [(m.row, m.ordinal, m.page_group) for m in maps] == [(child, 0, 0), (child, 1, 1), (child, 2, 3)]
    assert policy.grow(1)
    stride = 2 * KB  # of a token over both layers
    assert policy.drain() == [CopyRow(0, parent, child, 2 * 64 * KB, 70 * stride)]
    assert policy.usage().live == (70 + 71 - 64) * 4 * KB
    policy.check_integrity()


def test_a_fork_at_the_end_of_a_page_group_copies_nothing():
    policy = rows_of()
    policy.admit(Admission([Sequence(0, 64, 20)], 64))
    policy.sharing.fork(0, Sequence(1, 64, 20))
    policy.sharing.grow_gang([0, 1])
    assert not any(isinstance(action, CopyRow) for action in policy.drain())


def test_a_fork_in_the_row_of_a_dead_sibling_finds_it_mapped():
    """Beam search: who dies leaves a row that begins as its sibling's does; only the last part is copied."""
    policy = rows_of()
    policy.admit(Admission([Sequence(i, 70, 20) for i in range(3)], 70))
    assert policy.sharing.grow_gang([0, 1, 2])
    policy.drain()
    policy.look_ahead()
    row = policy.row(2)
    policy.release(2)
    assert policy.sharing.fork(1, Sequence(7, 70, 20))
    assert policy.row(7) == row
    assert policy.drain() == []
    assert policy.grow(7)
    assert [type(action) for action in policy.drain()] == [CopyRow]
    policy.check_integrity()


def test_a_row_that_nobody_forks_into_is_unmapped_in_the_background():
    policy = rows_of(eager_allocation=False, reclaim_threshold=0.0)
    policy.admit(Admission([Sequence(i, 70, 20) for i in range(2)], 70))
    policy.sharing.grow_gang([0, 1])
    policy.drain()
    policy.look_ahead()
    row = policy.row(1)
    policy.release(1)
    assert policy.drain() == []
    assert [(type(a), a.row, a.ordinal) for a in policy.look_ahead()] == [(Unmap, row, n) for n in (2, 1, 0)]
    policy.check_integrity()
    policy.release(0)  # alone by now: its page-groups wait for the next request
    assert policy.usage().deferred == 3 * 2 * 64 * KB
    policy.check_integrity()


def test_a_fork_without_memory_or_row_changes_nothing():
    for options in ({"page_groups": 3}, {"max_rows": 1}):
        policy = rows_of(eager_allocation=False, **options)
        policy.admit(Admission([Sequence(0, 70, 20)], 70))
        before = policy.usage(), policy.drain()
        assert not policy.sharing.fork(0, Sequence(1, 70, 20))
        assert (policy.usage(), before[1]) == before
        assert policy.drain() == []
        policy.check_integrity()


def test_a_ring_is_not_shared():
    policy = VAttentionPolicy(
        VAttentionConfig(page_group="64KB", watermark=0.0),
        sliding_layout(1, 1, 64, 4, 128),
        64 * 64 * KB,
        max_tokens=512,
    )
    policy.admit(Admission([Sequence(0, 200, 20)], 200))
    policy.drain()
    policy.sharing.fork(0, Sequence(1, 200, 20))
    maps = [m for m in policy.drain() if isinstance(m, Map)]
    assert {m.page_group for m in maps if m.group == 1}.isdisjoint({0})
    assert policy.grow(1)
    copies = {a.group: (a.start, a.stop) for a in policy.drain() if isinstance(a, CopyRow)}
    assert copies[1] == (0, 64 * 1024)  # all that the window remembers
    assert copies[0] == (3 * 64 * KB, 200 * 1024)
    policy.check_integrity()


def test_a_planted_alias_that_is_not_counted_is_found():
    policy = rows_of()
    policy.admit(Admission([Sequence(0, 70, 4), Sequence(1, 70, 4)], 70))
    policy._aliases.owners[0].unshare([0])
    with pytest.raises(IntegrityError, match="more than once"):
        policy.check_integrity()
