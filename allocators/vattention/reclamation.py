"""Deferred reclamation (section 6.1.2): a row keeps its page-groups when its request ends, and the next inherits them.

    an idle row              |== deferred ==|       its next request maps only what it lacks
    the slot, an idle row    |== premapped ==|      kept ready for the next request (eager allocation)
    a live row               |===== needed =====|== surplus ==|

Under pressure memory is taken back in this order: page-groups of idle rows, surplus of live rows, the slot. A row that
shared page-groups (`aliasing.py`) is *stale* when its request ends: what it shared is not its own any more, but stays
mapped until the next `look_ahead`, so that a fork before that may find most of what it needs mapped.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from typing import Protocol

from kvarena.allocators.actions import Action
from kvarena.allocators.integrity import expect
from kvarena.allocators.vattention.rows import Row, Rows


class IdleRows:
    """Rows without a request, ordered by how much is mapped in them."""

    def __init__(self, rows: Seq[Row]) -> None:
        self._rows = rows
        self._order = sorted((row.mapped, row.index) for row in rows)

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Row]:
        return (self._rows[index] for _, index in self._order)

    def add(self, row: Row) -> None:
        """A row goes idle."""
        insort(self._order, (row.mapped, row.index))

    def remove(self, row: Row) -> None:
        """A row is taken, or about to change."""
        del self._order[bisect_left(self._order, (row.mapped, row.index))]

    def best_fit(self, needed: int) -> Row:
        """The least full row that holds `needed` page-groups, or else the fullest of all."""
        i = bisect_left(self._order, (needed, -1))
        return self._rows[self._order[i][1]] if i < len(self._order) else self.fullest()

    def fullest(self) -> Row:
        """The row with the most page-groups; of several the first."""
        return self._rows[self._order[bisect_left(self._order, (self._order[-1][0], -1))][1]]

    def least_full_first(self) -> Iterable[Row]:
        """Rows with anything mapped, as they are now."""
        return [self._rows[index] for _, index in self._order[bisect_left(self._order, (1, -1)) :]]


class Evictable(Protocol):
    """Rows that are kept for what they hold, until their memory is wanted (`cached_rows.py`)."""

    @property
    def num_rows(self) -> int:
        """How many rows."""

    @property
    def needed(self) -> int:
        """Page-groups that would not be needed without them."""

    @property
    def oldest(self) -> int | None:
        """Id of the one to go first."""

    def evict(self, actions: list[Action]) -> None:
        """Let the first go; its row is without a request."""


class Reclamation:
    """Rows without a request, and what can be taken back. Memory is counted in page-groups over all tensors."""

    def __init__(self, rows: Rows, deferred: bool, threshold: int, slot_page_groups: int) -> None:
        """In the background idle rows give back while less than `threshold` is free. The slot is kept ready with so
        many page-groups in every tensor; where there are none there is no slot.
        """
        self.idle = IdleRows(rows.all)
        self.slot: Row | None = None
        self.stale: dict[int, Row] = {}  # by index
        self.cache: Evictable | None = None
        self.is_deferred = deferred
        self._rows = rows
        self._threshold = threshold
        self._has_slot = slot_page_groups > 0
        self._slot_has = [min(slot_page_groups, g.page_groups_for(rows.max_tokens)) for g in rows.geometries]
        self._nothing = [0] * len(rows.geometries)

    @property
    def num_rows(self) -> int:
        """How many rows are without a request."""
        return len(self.idle) + len(self.stale)

    @property
    def premapped(self) -> int:
        """Page-groups that the slot is kept ready with."""
        return 0 if self.slot is None else self._rows.over_tensors(self._slot_has)

    @property
    def deferred(self) -> int:
        """Page-groups of rows without a request, those of the slot excepted."""
        return self._rows.total - self._rows.free - self._rows.sums.mapped - self.premapped

    def fits(self, page_groups: int, rows: int = 0) -> bool:
        """Whether so many more page-groups, and rows, are free or can be taken back."""
        if self.fits_beside_cache(page_groups, rows):
            return True
        if self.cache is None or rows > self.num_rows + self.cache.num_rows:
            return False
        return self._rows.sums.needed - self.cache.needed + page_groups <= self._rows.total

    def fits_beside_cache(self, page_groups: int, rows: int) -> bool:
        """The same, where the cache keeps all that it has."""
        return rows <= self.num_rows and self._rows.sums.needed + page_groups <= self._rows.total

    def obtainable(self, margin: int) -> int:
        """Page-groups that are free, or could be if live rows kept only what `margin` more tokens each need."""
        surplus = sum([row.spare(margin) for row in self._rows.with_surplus.values()])
        return self._rows.total - self._rows.sums.mapped + surplus

    # ---- rows that come and go ---------------------------------------------------------------------------------

    def inherit(self, length: int, actions: list[Action]) -> Row:
        """Take the idle row that fits so many tokens best; where the length is unknown, 0, the fullest."""
        if self.stale and not len(self.idle):
            self.clear_stale(actions)
        row = self.idle.best_fit(self._rows.page_groups_for(length)) if length else self.idle.fullest()
        self.take(row)
        return row

    def take(self, row: Row) -> None:
        """Take a row that is without a request."""
        if self.stale.pop(row.index, None) is None:
            self.idle.remove(row)
        if row is self.slot:
            self.slot = None

    def put(self, row: Row, actions: list[Action]) -> None:
        """A row is without a request from now on. What is mapped in it stays, unless reclamation is not deferred."""
        self._rows.vacate(row)
        if row.foreign:
            self.stale[row.index] = row
        else:
            self.idle.add(row)
        if self.is_deferred:
            return
        if row.foreign:
            self.clear_stale(actions)
        else:
            self._trim(row, self._nothing, self._rows.total, actions)

    def clear_stale(self, actions: list[Action]) -> None:
        """Unmap what is mapped in stale rows; they are idle, and empty, from now on."""
        for row in self.stale.values():
            for group, foreign in enumerate(row.foreign):
                while row.page_groups[group]:
                    self._rows.unmap_last(row, group, actions, foreign=foreign)
            row.foreign = ()
            self.idle.add(row)
        self.stale.clear()

    # ---- taking back -------------------------------------------------------------------------------------------

    def make_room(self, page_groups: int, rows: int, actions: list[Action], but: int | None = None) -> None:
        """Let the cache give up rows, `but` one, until so many page-groups, and rows, can be taken back elsewhere."""
        cache = self.cache
        while cache and cache.oldest not in (None, but) and not self.fits_beside_cache(page_groups, rows):
            cache.evict(actions)

    def make_room_ahead(self, page_groups: int, actions: list[Action]) -> None:
        """Let the cache give up rows, until so many page-groups can be mapped beside this iteration."""
        while self.cache and self.cache.oldest is not None and page_groups > self.obtainable(margin=1):
            self.cache.evict(actions)

    def extend(self, row: Row, length: int, actions: list[Action]) -> None:
        """Map what a live row lacks for `length` tokens, if anything; the caller knows that memory suffices."""
        if missing := self._rows.missing(row, length):
            self.take_back(missing, actions, margins=(1, 0))
            self._rows.map(row, length, actions)
            self._rows.changed = True

    def take_back(self, wanted: int, actions: list[Action], margins: tuple[int, ...]) -> None:
        """Unmap until `wanted` are free: idle rows, surplus of live rows, the slot.

        What a live row has been mapped for its next iteration is surplus too, and goes last of it (margin 0).
        """
        rows = self._rows
        self.take_back_idle(wanted, actions)
        for margin in margins:
            if rows.free >= wanted:
                return
            for row in sorted(rows.with_surplus.values(), key=lambda row: -row.admitted):
                if rows.free < wanted and row.spare(margin):
                    rows.trim(row, rows.in_each_tensor(row.length + margin), wanted, actions)
                    rows.measure(row)
        if rows.free < wanted and self.slot is not None:
            slot, self.slot = self.slot, None
            self._trim(slot, self._nothing, wanted, actions)

    def take_back_idle(self, wanted: int, actions: list[Action]) -> None:
        """Unmap what rows without a request have, the least full first, until `wanted` are free; not from the slot."""
        if self._rows.free >= wanted:
            return
        self.clear_stale(actions)
        for row in self.idle.least_full_first():
            self._trim(row, self._slot_has if row is self.slot else self._nothing, wanted, actions)

    def in_background(self, actions: list[Action]) -> None:
        """Give back below the threshold, and keep the fullest idle row ready, if what it lacks is free above it."""
        self.take_back_idle(self._threshold, actions)
        if not self._has_slot or self.slot is not None or not len(self.idle):
            return
        row = self.idle.fullest()
        if self._rows.lacking(row, self._slot_has) > self._rows.free - self._threshold:
            return
        self.slot = row
        self.idle.remove(row)
        self._rows.attach(row, self._slot_has, actions)
        self.idle.add(row)

    def _trim(self, row: Row, keep: Seq[int], wanted: int, actions: list[Action]) -> None:
        self.idle.remove(row)
        self._rows.trim(row, keep, wanted, actions)
        self.idle.add(row)

    def check_integrity(self) -> None:
        """Recount rows without a request, and what the slot is kept ready with."""
        unused = [row for row in self._rows.all if row.seq_id is None]
        idle = sorted((row.mapped, row.index) for row in unused if not row.foreign)
        expect("idle rows by page-groups", [(row.mapped, row.index) for row in self.idle], idle)
        expect("stale rows", set(self.stale), {row.index for row in self._rows.all if row.foreign})
        if self.slot is not None:
            expect("the slot lacks page-groups", self._rows.lacking(self.slot, self._slot_has), 0)
