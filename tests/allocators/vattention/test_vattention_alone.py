"""vAttention's classes stand alone: a plain operation walks through few files, and rows work without the rest."""

import sys
from collections.abc import Callable
from pathlib import Path

from vattention_by_hand import LAYOUT, policy_of

import kvarena.allocators
from kvarena.allocators.policy import Admission, Sequence
from kvarena.allocators.sizes import KB
from kvarena.allocators.vattention.aliasing import Aliases
from kvarena.allocators.vattention.page_groups import row_geometries
from kvarena.allocators.vattention.policy import VAttentionPolicy
from kvarena.allocators.vattention.reclamation import Reclamation
from kvarena.allocators.vattention.rows import Rows

FOLDER = str(Path(kvarena.allocators.__path__[0]))


def files_walked(operation: Callable[[], object]) -> set[str]:
    """Files under allocators/ in which the operation calls anything."""
    files = set()

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(FOLDER):
            files.add(frame.f_code.co_filename.removeprefix(FOLDER))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        assert operation() in (True, 0, None)
    finally:
        sys.setprofile(before)
    return files


def test_a_plain_operation_walks_through_few_files():
    policy = policy_of(overlap=True, deferred_reclamation=True, eager_allocation=True, reclaim_threshold=0.1)
    request, child = Admission([Sequence(0, 100, 50)], 100), Sequence(1, 100, 50)
    assert len(files_walked(lambda: policy.admit(request))) <= 4
    policy.drain(), policy.look_ahead()
    assert len(files_walked(lambda: policy.release(0))) <= 4
    policy.admit(request)
    policy.drain(), policy.look_ahead()
    assert len(files_walked(lambda: policy.sharing.fork(0, child))) <= 6


def test_the_policy_is_composed_not_inherited():
    assert len(VAttentionPolicy.__mro__) - 1 <= 3
    assert len([name for name in dir(VAttentionPolicy) if not name.startswith("__")]) <= 40


def test_rows_alone_then_reclaimed_then_aliased():
    rows = Rows(row_geometries(LAYOUT, 64 * KB, tensor_slicing=False), page_groups=12, num_rows=3, max_tokens=1024)
    actions = []
    rows.occupy(rows.all[2], 7, length=100, final=150)
    rows.map(rows.all[2], 100, actions)
    assert [(each.row, each.ordinal) for each in actions] == [(2, 0), (2, 1)]  # of 64 tokens, in K and in V
    assert (rows.free, rows.sums.needed) == (8, 4)
    rows.check_integrity()
    rows.vacate(rows.all[2])

    reclamation = Reclamation(rows, deferred=True, threshold=0, slot_page_groups=0)
    assert reclamation.deferred == 4
    heir = reclamation.inherit(60, actions)
    assert heir.index == 2
    rows.occupy(heir, 8, length=64, final=64)
    assert reclamation.obtainable(margin=0) == 10
    reclamation.check_integrity()

    aliases = Aliases(rows, reclamation)
    aliases.fork(heir, 9, length=64, final=100, actions=actions)
    assert rows.live[9].page_groups == [heir.page_groups[0][:1]]
    assert (rows.shared, rows.free, rows.sums.needed) == (2, 8, 2)
    aliases.check_integrity(cached=[])
    rows.check_integrity()
