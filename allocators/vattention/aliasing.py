"""Rows that share page-groups: one physical page-group, mapped in several rows (an alias). No paper has it built.

    parent   | s0 | s1 | s2..|           length in bytes: 2 page-groups and a part
    child    | s0 | s1 | s3..|           s0, s1: the same memory; s3: its own, into which the part of s2 is copied

A page-group is shared only where it lies wholly below the length in bytes: it is never written again. A ring (sliding
window) is overwritten, so that nothing of it is shared. So an alias is live in each of its rows, below every mark, and
counting it once is one correction of the sums.

Where a beam dies, a child of another follows in its row: only full page-groups that differ are mapped anew.

    dead     | s0 | s4 | s5..|           s0 is in place, s1 is mapped instead of s4, s5 is written

A row that is left while it shares keeps its mappings until `look_ahead`, although what it shared is not its own any
more: a fork before that may find most of what it needs mapped.
"""

from collections.abc import Sequence as Seq
from itertools import takewhile
from operator import eq

from kvarena.allocators.policy import Action, Map, Unmap
from kvarena.allocators.vattention.page_groups import RowGeometry
from kvarena.allocators.vattention.row import NOTHING, Marks, Row
from kvarena.allocators.vattention.rows import VirtualRows, expect


class SharedRows(VirtualRows):
    """Virtual rows with forks."""

    def __init__(
        self, geometries: tuple[RowGeometry, ...], page_groups: int, num_rows: int, max_tokens: int, slot_groups: int
    ) -> None:
        """As of all rows."""
        super().__init__(geometries, page_groups, num_rows, max_tokens, slot_groups)
        # Rows that were left, by index; with each, how many leading slabs by layer group are not its own.
        self._left: dict[int, tuple[Row, list[int]]] = {}

    @property
    def has_idle(self) -> bool:
        """Whether any row is without a request."""
        return bool(self._left) or super().has_idle

    @property
    def num_idle(self) -> int:
        """How many rows are without a request."""
        return len(self._idle) + len(self._left)

    def shareable(self, length: int) -> list[int]:
        """Slabs by layer group that lie wholly below so many tokens."""
        return [g.resident_bytes(length) // g.page_group if g.window is None else 0 for g in self.geometries]

    def page_groups_to_fork(self, length: int) -> int:
        """Page-groups that a fork of a sequence of `length` tokens has for its own."""
        return self.page_groups_for(length) - self._page_groups(self.shareable(length))

    def fork(self, parent: Row, seq_id: int, length: int, final: int, actions: list[Action]) -> Row:
        """Give a copy of the parent's first `length` tokens a row: what can be shared is mapped again, for the rest
        there is room.

        The caller knows that a row is idle and memory suffices.
        """
        shared = self.shareable(length)
        row = self._row_for(parent, length, shared)
        for group, count in enumerate(shared):
            self._alias(row, group, parent.slabs[group][:count], actions)
        self._left.pop(row.index, None)
        self._count_aliases(self._page_groups(shared))
        self._settle_in(row, seq_id, length, final)
        self.extend(row, length, actions)
        return row

    def in_place(self, row: Row, parent: Row, length: int) -> list[int]:
        """Leading slabs by layer group, wholly below `length` tokens, that a row maps as another does."""
        return self._in_place(row, parent, self.shareable(length))

    def follow(self, row: Row, parent: Row, length: int, actions: list[Action]) -> None:
        """Map whatever of `length` tokens can be shared as another live row does, in place of what the row has there.

        Both have that length, so the row needs no more memory, and has as much mapped as before.
        """
        for group, (first, end) in enumerate(
            zip(self.in_place(row, parent, length), self.shareable(length), strict=True)
        ):
            wanted, left = parent.slabs[group][first:end], row.slabs[group][first:end]
            if not wanted:
                continue
            actions += [Unmap(group, row.index, first + i, slab) for i, slab in reversed(list(enumerate(left)))]
            actions += [Map(group, row.index, first + i, slab) for i, slab in enumerate(wanted)]
            row.slabs[group][first:end] = wanted
            shared, tensors = self._unshare(group, left), self.geometries[group].num_tensors
            for slab in reversed(left[shared:]):
                self._slabs[group].give(slab)
            for slab in wanted:
                self._slabs[group].share(slab)
            self.free += tensors * (len(left) - shared)
            self._count_aliases(tensors * (len(wanted) - shared))

    def owns_alone(self, row: Row, length: int, beyond: Seq[int]) -> bool:
        """Whether no other row owns what a row maps of `length` tokens beyond so many slabs by layer group."""
        wanted = zip(self._slabs, row.slabs, beyond, self.shareable(length), strict=True)
        return not any([any(map(known.is_shared, slabs[first:count])) for known, slabs, first, count in wanted])

    def _row_for(self, parent: Row, length: int, shared: list[int]) -> Row:
        """The left row that maps most of what will be shared; else an idle one: the emptiest, where it must make way
        for what is shared.
        """
        if self._left:
            matches = {i: self._page_groups(self._in_place(row, parent, shared)) for i, (row, _) in self._left.items()}
            best = max(matches, key=lambda index: (matches[index], -index))
            if matches[best] or not len(self._idle):
                return self._left[best][0]
        row = next(iter(self._idle)) if any(shared) else self._idle.best_fit(self.page_groups_for(length))
        self._take_idle(row)
        return row

    @staticmethod
    def _in_place(row: Row, parent: Row, shared: list[int]) -> list[int]:
        """Leading slabs by layer group that the row maps as the parent does."""
        return [
            _common(slabs, wanted[:count]) for slabs, wanted, count in zip(row.slabs, parent.slabs, shared, strict=True)
        ]

    def _alias(self, row: Row, group: int, wanted: list[int], actions: list[Action]) -> None:
        """Let a row begin with these slabs, which others own; what it had beyond them stays, if nothing must move."""
        same = _common(row.slabs[group], wanted)
        if same < max(len(wanted), self._foreign(row, group)):
            self._unmap_down_to(same, row, group, actions)
        for ordinal, slab in enumerate(wanted):
            self._slabs[group].share(slab)
            if ordinal >= same:
                row.slabs[group].append(slab)
                row.mapped += self.geometries[group].num_tensors
                actions.append(Map(group, row.index, ordinal, slab))

    def vacate(self, seq_id: int) -> Row:
        """Let the sequence's row go. If others own a part of it with it, the row is left to a fork or `clear_left`."""
        row = self.live[seq_id]
        foreign = [self._unshare(group, slabs) for group, slabs in enumerate(row.slabs)] if self.aliased else []
        super().vacate(seq_id)
        if any(foreign):
            self._count_aliases(-self._page_groups(foreign))
            self._idle.remove(row)
            self._left[row.index] = (row, foreign)
        return row

    def clear_left(self, actions: list[Action]) -> None:
        """Unmap what is mapped in rows that were left; they are idle, and empty, from now on."""
        for row, _ in list(self._left.values()):
            for group in range(len(row.slabs)):
                self._unmap_down_to(0, row, group, actions)
            del self._left[row.index]
            self._idle.add(row)

    def make_idle(self, actions: list[Action]) -> None:
        """See to it that an idle row can be inherited, if there is any."""
        if self._left and not len(self._idle):
            self.clear_left(actions)

    def take_back_idle(self, wanted: int, actions: list[Action]) -> None:
        """As of all rows; those that were left give back first."""
        if self._left and self.free < wanted:
            self.clear_left(actions)
        super().take_back_idle(wanted, actions)

    def trim_idle(self, row: Row, wanted: int, actions: list[Action], keep: Seq[int] = ()) -> None:
        """As of all rows; one that was left gives everything back."""
        if row.index in self._left:
            self.clear_left(actions)
        else:
            super().trim_idle(row, wanted, actions, keep)

    def _unshare(self, group: int, slabs: list[int]) -> int:
        """Give up what others own too: leading slabs. Returns how many."""
        shared = list(takewhile(self._slabs[group].is_shared, slabs))
        for slab in shared:
            self._slabs[group].unshare(slab)
        return len(shared)

    def _unmap_down_to(self, keep: int, row: Row, group: int, actions: list[Action]) -> None:
        """Unmap a row's last slabs; those of its own are free again."""
        slabs, tensors, foreign = row.slabs[group], self.geometries[group].num_tensors, self._foreign(row, group)
        while len(slabs) > keep:
            slab = slabs.pop()
            row.mapped -= tensors
            actions.append(Unmap(group, row.index, len(slabs), slab))
            if len(slabs) >= foreign:
                self._slabs[group].give(slab)
                self.free += tensors

    def _foreign(self, row: Row, group: int) -> int:
        """Leading slabs of a row that are mapped in it, but others'."""
        return self._left[row.index][1][group] if row.index in self._left else 0

    def _count_aliases(self, page_groups: int) -> None:
        """Correct the sums for page-groups that one more live row owns (one less, if negative)."""
        self.aliased += page_groups
        size = page_groups * self.geometries[0].page_group
        self.sums = self.sums.replaced(Marks(page_groups, page_groups, size, size), NOTHING)

    # ---- recounting --------------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Recount, aliases included."""
        super().check_integrity()
        owners = sum(len(self._owned(row, g)) * self.geometries[g].num_tensors for g, row in self._by_group())
        distinct = sum(
            len({slab for row in self._rows for slab in self._owned(row, g)}) * geometry.num_tensors
            for g, geometry in enumerate(self.geometries)
        )
        expect("page-groups owned by several rows, beyond the first", self.aliased, owners - distinct)

    def _by_group(self) -> list[tuple[int, Row]]:
        return [(group, row) for row in self._rows for group in range(len(row.slabs))]

    def _owned(self, row: Row, group: int) -> list[int]:
        return row.slabs[group][self._foreign(row, group) :]

    def _is_left(self, row: Row) -> bool:
        return row.index in self._left

    def recounted_leaves(self) -> tuple[int, ...]:
        """Row by row: an alias in one of its rows only, and nothing that a row was left with of others."""
        live, *others, retained = super().recounted_leaves()
        size = self.geometries[0].page_group
        foreign = sum(self._page_groups(counts) for _, counts in self._left.values())
        return (live - self.aliased * size, *others, retained - foreign * size)


def _common(left: list[int], right: list[int]) -> int:
    """Length of the longest prefix that two lists share."""
    return sum(takewhile(bool, map(eq, left, right)))
