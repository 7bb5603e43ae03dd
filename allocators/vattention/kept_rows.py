"""Rows at rest: their sequence has gone, and they are kept for what they hold (`prefix_cache.py`).

    sequence 7 ends    | s0 | s1 | s2..|        row at rest   | s0 | s1 |......     whole page-groups count
    sequence 9         | s0 | s1 | s3..|        took it over: nothing is mapped again

In the sums a row at rest is a live row that does not grow. Slabs know how many of their owners rest, so that resting,
waking and the sums cost what they touch, however many rows rest.
"""

from bisect import bisect_left

from kvarena.allocators.policy import Action, Unmap
from kvarena.allocators.vattention.aliasing import SharedRows
from kvarena.allocators.vattention.page_groups import RowGeometry
from kvarena.allocators.vattention.row import NOTHING, Row
from kvarena.allocators.vattention.rows import expect


class RestingRows(SharedRows):
    """Virtual rows, some of which rest."""

    def __init__(
        self, geometries: tuple[RowGeometry, ...], page_groups: int, num_rows: int, max_tokens: int, slot_groups: int
    ) -> None:
        """As of all rows."""
        super().__init__(geometries, page_groups, num_rows, max_tokens, slot_groups)
        self._past_rest = 0  # page-groups that rows at rest need past what they hold (`read_past`)
        self._untrimmed: dict[int, Row] = {}  # of those at rest, by id: may have more than they need

    @property
    def held_at_rest(self) -> int:
        """Page-groups of K/V that only rows at rest own."""
        return sum(g.num_tensors * slabs.num_at_rest for g, slabs in zip(self.geometries, self._slabs, strict=True))

    @property
    def needed_at_rest(self) -> int:
        """Page-groups that would not be needed if no row rested."""
        return self.held_at_rest + self._past_rest

    def needed_by_others(self, row: Row, length: int) -> int:
        """Page-groups wholly below `length` that a row which does not rest owns, of those that `row` begins with.

        Who owns a slab of a row owns all before it, so these come first.
        """
        needed = 0
        for slabs, mine, g, count in zip(self._slabs, row.slabs, self.geometries, self.shareable(length), strict=True):
            needed += g.num_tensors * bisect_left(mine, True, 0, count, key=slabs.is_at_rest)
        return needed

    def shares_past(self, row: Row, length: int) -> bool:
        """Whether a live row shares more than its first `length` tokens, which fill whole page-groups."""
        return any(self._shared_past(slabs, group, keep) for group, slabs, keep in self._cut_at(row, length))

    def rest(self, seq_id: int, resting_id: int, length: int) -> None:
        """Let a live row rest for its first `length` tokens, which fill whole page-groups. It shares none past them."""
        row = self.live.pop(seq_id)
        self._take_out(row)
        row.seq_id, row.length, row.final = resting_id, length, length
        self.resting[resting_id] = self._untrimmed[resting_id] = row
        self.settle(row)
        self._past_rest += self.page_groups_to_fork(length)
        for group, slabs, count in self._cut_at(row, length):
            self._slabs[group].rest(slabs[:count])

    def wake(self, resting_id: int) -> Row:
        """Let a row rest no more: it is live, as a sequence of the same id."""
        row = self.live[resting_id] = self.resting.pop(resting_id)
        self._untrimmed.pop(resting_id, None)
        self._past_rest -= self.page_groups_to_fork(row.length)
        for group, slabs, count in self._cut_at(row, row.length):
            self._slabs[group].wake(slabs[:count])
        return row

    def take_over(self, resting_id: int, seq_id: int, length: int, final: int, actions: list[Action]) -> Row:
        """Let a sequence live in a row at rest, with the first `length` tokens that it holds.

        Past them the row gives up its part in what others own too; the caller knows that memory suffices.
        """
        row = self.wake(resting_id)
        del self.live[resting_id]
        for group, slabs, keep in self._cut_at(row, length):
            if self._shared_past(slabs, group, keep):
                self._give_up_past(keep, row, group, actions)
        self._take_out(row)
        self._settle_in(row, seq_id, length, final)
        self.extend(row, length, actions)
        return row

    def trim_resting(self, actions: list[Action]) -> None:
        """Unmap what rows at rest do not need: nobody inherits it but who goes on from all that they hold."""
        for row in self._untrimmed.values():
            self._trim(row, self._slabs_for(row.length), self.total, actions)
            self.settle(row)
        self._untrimmed.clear()

    def _take_out(self, row: Row) -> None:
        """Take a row out of the sums, until it is settled again."""
        self.sums = self.sums.replaced(row.marks, NOTHING)
        row.marks = NOTHING

    def _cut_at(self, row: Row, length: int) -> list[tuple[int, list[int], int]]:
        """By layer group: its number, the row's slabs, and how many of them lie wholly below a length."""
        return [(group, row.slabs[group], keep) for group, keep in enumerate(self.shareable(length))]

    def _shared_past(self, slabs: list[int], group: int, keep: int) -> bool:
        return len(slabs) > keep and self._slabs[group].is_shared(slabs[keep])

    def _give_up_past(self, keep: int, row: Row, group: int, actions: list[Action]) -> None:
        """Unmap all but a live row's first slabs; those that are shared stay the others'."""
        slabs, tensors = row.slabs[group], self.geometries[group].num_tensors
        foreign = self._unshare(group, slabs[keep:])
        self._count_aliases(-foreign * tensors)
        while len(slabs) > keep:
            slab = slabs.pop()
            row.mapped -= tensors
            actions.append(Unmap(group, row.index, len(slabs), slab))
            if len(slabs) >= keep + foreign:
                self._slabs[group].give(slab)
                self.free += tensors

    def check_integrity(self) -> None:
        """Recount, rows at rest included."""
        super().check_integrity()
        past = sum(self.page_groups_to_fork(row.length) for row in self.resting.values())
        expect("page-groups needed past the ends of rows at rest", self._past_rest, past)

    def _slabs_at_rest(self, group: int) -> list[int]:
        counts = [(row, self.shareable(row.length)[group]) for row in self.resting.values()]
        return [slab for row, count in counts for slab in row.slabs[group][:count]]
