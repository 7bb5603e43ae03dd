"""Rows that share page-groups: one physical page-group, mapped in several rows (an alias). No paper has it built.

    parent   | p0 | p1 | p2..|           length in bytes: 2 page-groups and a part
    child    | p0 | p1 | p3..|           p0, p1: the same memory; p3: its own, into which the part of p2 is copied

The paper names aliasing as something that virtual memory allows (section 8.1), and its artifact does not do it. A
page-group is shared only where it lies wholly below the length in bytes: it is never written again. So it is live in
each of its rows, below every mark, and counting it once is one correction of the sums.
"""

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from itertools import takewhile
from operator import eq

from kvarena.allocators.actions import Action, Map, Unmap
from kvarena.allocators.integrity import expect
from kvarena.allocators.vattention.reclamation import Reclamation
from kvarena.allocators.vattention.rows import Row, Rows


class Owners:
    """How many rows own each page-group of a layer group, and how many of these are only cached (`cached_rows.py`)."""

    def __init__(self) -> None:
        self._extra: dict[int, int] = {}  # page-group -> rows that own it beyond the first, where there are any
        self._cached: dict[int, int] = {}  # page-group -> cached rows that own it, where there are any
        self.num_cached = 0  # page-groups that only cached rows own

    def share(self, page_group: int) -> None:
        """Let one more row, which is not cached, own a page-group that somebody owns."""
        self.num_cached -= self.is_cached(page_group)
        self._extra[page_group] = self._extra.get(page_group, 0) + 1

    def is_shared(self, page_group: int) -> bool:
        """Whether several rows own it."""
        return page_group in self._extra

    def unshare(self, page_groups: Iterable[int]) -> int:
        """Give up a part in the leading ones of a row's page-groups that others own too. Returns how many there are."""
        shared = list(takewhile(self.is_shared, page_groups))
        for page_group in shared:
            self._extra[page_group] -= 1
            if not self._extra[page_group]:
                del self._extra[page_group]
            self.num_cached += self.is_cached(page_group)
        return len(shared)

    def is_cached(self, page_group: int) -> bool:
        """Whether only cached rows own it."""
        return page_group in self._cached and self._cached[page_group] == 1 + self._extra.get(page_group, 0)

    def cache(self, page_groups: Iterable[int]) -> None:
        """One of the rows that own these is only cached from now on."""
        for page_group in page_groups:
            self._cached[page_group] = self._cached.get(page_group, 0) + 1
            self.num_cached += self.is_cached(page_group)

    def uncache(self, page_groups: Iterable[int]) -> None:
        """One of the cached rows that own these is so no more."""
        for page_group in page_groups:
            self.num_cached -= self.is_cached(page_group)
            self._cached[page_group] -= 1
            if not self._cached[page_group]:
                del self._cached[page_group]

    def check_integrity(self, owned: Iterable[int], cached: Iterable[int]) -> None:
        """Recount from what rows own, and what cached rows are kept for: a page-group as often as there is a row."""
        owners, kept = Counter(owned), Counter(cached)
        expect("page-groups in rows more than once", self._extra, {each: n - 1 for each, n in owners.items() if n > 1})
        expect("page-groups in cached rows", self._cached, dict(kept))
        expect("page-groups in cached rows alone", self.num_cached, sum(owners[each] == n for each, n in kept.items()))


class Aliases:
    """Rows that begin as others do."""

    def __init__(self, rows: Rows, reclamation: Reclamation) -> None:
        self.owners = [Owners() for _ in rows.geometries]
        self._rows = rows
        self._reclamation = reclamation

    def shareable(self, length: int) -> list[int]:
        """Page-groups of each tensor, by layer group, that a fork of a sequence of `length` tokens shares with it."""
        return [g.full_page_groups(length) for g in self._rows.geometries]

    def shared_below(self, length: int) -> int:
        """`shareable`, over all tensors."""
        return self._rows.over_tensors(self.shareable(length))

    def own_of_fork(self, length: int) -> int:
        """Page-groups that a fork of a sequence of `length` tokens has for its own."""
        return self._rows.page_groups_for(length) - self.shared_below(length)

    def in_place(self, row: Row, parent: Row, length: int) -> list[int]:
        """Leading page-groups by layer group, wholly below `length` tokens, that a row maps as another does."""
        return [
            _common(mapped, wanted[:count])
            for mapped, wanted, count in zip(row.page_groups, parent.page_groups, self.shareable(length), strict=True)
        ]

    def fork(self, parent: Row, seq_id: int, length: int, final: int, actions: list[Action]) -> None:
        """Give a copy of the parent's first `length` tokens a row: what can be shared is mapped again, for the rest
        there is room.

        The caller knows that a row is idle and memory suffices.
        """
        shared = self.shareable(length)
        row = self._row_for(parent, length)
        for group, count in enumerate(shared):
            self._alias(row, group, parent.page_groups[group][:count], actions)
        row.foreign = ()
        self._rows.occupy(row, seq_id, length, final)
        self._rows.count_shared(self._rows.over_tensors(shared))
        self._reclamation.extend(row, length, actions)

    def _row_for(self, parent: Row, length: int) -> Row:
        """The stale row that maps most of what will be shared; else an idle one: the emptiest, where it must make way
        for what is shared.
        """
        stale, idle = self._reclamation.stale, self._reclamation.idle
        in_place = {i: self._rows.over_tensors(self.in_place(row, parent, length)) for i, row in stale.items()}
        best = max(in_place, key=lambda index: (in_place[index], -index), default=None)
        if best is not None and (in_place[best] or not len(idle)):
            row = stale[best]
        elif any(self.shareable(length)):
            row = next(iter(idle))
        else:
            row = idle.best_fit(self._rows.page_groups_for(length))
        self._reclamation.take(row)
        return row

    def _alias(self, row: Row, group: int, wanted: list[int], actions: list[Action]) -> None:
        """Let a row begin with these page-groups, which others own; what it had beyond them stays, if nothing moves."""
        mapped, foreign = row.page_groups[group], row.foreign[group] if row.foreign else 0
        same = _common(mapped, wanted)
        if same < max(len(wanted), foreign):
            while len(mapped) > same:
                self._rows.unmap_last(row, group, actions, foreign=foreign)
        for ordinal, page_group in enumerate(wanted):
            self.owners[group].share(page_group)
            if ordinal >= same:
                mapped.append(page_group)
                row.mapped += self._rows.geometries[group].num_tensors
                actions.append(Map(group, row.index, ordinal, page_group))

    def leave(self, row: Row) -> None:
        """Give up the row's part in what others own too, as its request ends; it stays mapped."""
        foreign = [owners.unshare(mapped) for owners, mapped in zip(self.owners, row.page_groups, strict=True)]
        if any(foreign):
            row.foreign = foreign
            self._rows.count_shared(-self._rows.over_tensors(foreign))

    def give_up_past(self, row: Row, keep: Seq[int], actions: list[Action]) -> None:
        """Unmap all but a row's first page-groups, `keep` by layer group; those that are shared stay the others'."""
        for group, first in enumerate(keep):
            mapped = row.page_groups[group]
            if len(mapped) > first and self.owners[group].is_shared(mapped[first]):
                shared = self.owners[group].unshare(mapped[first:])
                self._rows.count_shared(-shared * self._rows.geometries[group].num_tensors)
                while len(mapped) > first:
                    self._rows.unmap_last(row, group, actions, foreign=first + shared)

    # ---- a row whose sequence becomes a copy of another of the same length -------------------------------------

    def _differ(self, row: Row, parent: Row) -> list[slice]:
        """By layer group, where a row could share page-groups with another and does not."""
        ends = zip(self.in_place(row, parent, row.length), self.shareable(row.length), strict=True)
        return [slice(first, end) for first, end in ends]

    def differ_alone(self, row: Row, parent: Row) -> bool:
        """Whether no other row owns what the row has in place of what it could share."""
        theirs = zip(self.owners, row.page_groups, self._differ(row, parent), strict=True)
        return not any([any(map(owners.is_shared, mapped[differ])) for owners, mapped, differ in theirs])

    def follow(self, row: Row, parent: Row, actions: list[Action]) -> None:
        """Map whatever can be shared as the parent does, in place of what the row has there.

        The row needs no more memory, and has as much mapped as before.
        """
        for group, differ in enumerate(self._differ(row, parent)):
            wanted, left = parent.page_groups[group][differ], row.page_groups[group][differ]
            if not wanted:
                continue
            places = range(differ.start, differ.stop)
            actions += [Unmap(group, row.index, *each) for each in reversed(list(zip(places, left, strict=True)))]
            actions += [Map(group, row.index, *each) for each in zip(places, wanted, strict=True)]
            row.page_groups[group][differ] = wanted
            shared, tensors = self.owners[group].unshare(left), self._rows.geometries[group].num_tensors
            for page_group in reversed(left[shared:]):
                self._rows.pools[group].give(page_group)
            for page_group in wanted:
                self.owners[group].share(page_group)
            self._rows.free += tensors * (len(left) - shared)
            self._rows.count_shared(tensors * (len(wanted) - shared))
        self._rows.changed = True

    def check_integrity(self, cached: Iterable[Row]) -> None:
        """Recount owners. `cached` are the cached rows."""
        kept = [(row, self.shareable(row.length)) for row in cached]
        shared = []
        for group, owners in enumerate(self.owners):
            owned = [page_group for row in self._rows.all for page_group in row.owned(group)]
            held = [page_group for row, counts in kept for page_group in row.page_groups[group][: counts[group]]]
            owners.check_integrity(owned, held)
            shared.append(len(owned) - len(set(owned)))
        expect("page-groups owned by several rows", self._rows.shared, self._rows.over_tensors(shared))


def _common(left: list[int], right: list[int]) -> int:
    """Length of the longest prefix that two lists share."""
    return sum(takewhile(bool, map(eq, left, right)))
