"""The rows of vAttention's virtual tensors and the pool of page-groups behind them: who has which.

    a row with a request     |===== needed =====|== surplus ==|   addresses only
    an idle row              |== deferred ==|                     its next request inherits these
    the slot, an idle row    |== premapped ==|                    kept ready for the next request

A live row is owed what its length needs. All else can be taken back (`take_back`), so whether a request can be served
depends on one sum: the page-groups that live rows need.
"""

from collections.abc import Sequence as Seq

from kvarena.allocators.policy import Action, IntegrityError, Map, Unmap
from kvarena.allocators.usage import extent_usage
from kvarena.allocators.vattention.page_groups import RowGeometry
from kvarena.allocators.vattention.row import NOTHING, IdleRows, Row
from kvarena.allocators.vattention.slabs import SlabList


class VirtualRows:
    """Rows, page-groups, and the sums over them. Memory is counted in page-groups; a page-group fits any tensor."""

    def __init__(
        self, geometries: tuple[RowGeometry, ...], page_groups: int, num_rows: int, max_tokens: int, slot_groups: int
    ) -> None:
        """`geometries` by layer group; `slot_groups` page-groups in every tensor keep a row ready."""
        self.geometries = geometries
        self.total = self.free = page_groups
        self.max_tokens = max_tokens
        self.live: dict[int, Row] = {}  # by seq_id, in order of admission
        self.resting: dict[int, Row] = {}  # by id: in the sums as live rows, but nobody is in them (`kept_rows.py`)
        self.sums = NOTHING  # over live rows and those at rest; what several of them share, once
        self.aliased = 0  # page-groups of live rows that others own too, beyond the first (`aliasing.py`)
        self.slot: Row | None = None  # the idle row kept ready; has at least `_slot_slabs`
        self._slabs = [SlabList(page_groups // g.num_tensors) for g in geometries]
        self._rows = [Row(i, [[] for _ in geometries]) for i in range(num_rows)]
        self._idle = IdleRows(self._rows)
        self._with_surplus: dict[int, Row] = {}  # live rows that have more than they need, by index
        self._slot_slabs = [min(slot_groups, g.slabs_for(max_tokens)) for g in geometries]
        self._no_slabs = [0] * len(geometries)
        self._admissions = 0

    # ---- what there is -----------------------------------------------------------------------------------------

    @property
    def has_idle(self) -> bool:
        """Whether any row is without a request."""
        return len(self._idle) > 0

    @property
    def deferred(self) -> int:
        """Page-groups of idle rows, what the slot is kept ready with excepted."""
        return self.total - self.free - self.sums.mapped - self.premapped

    @property
    def premapped(self) -> int:
        """Page-groups that the slot is kept ready with."""
        return 0 if self.slot is None else self._page_groups(self._slot_slabs)

    @property
    def num_slabs(self) -> int:
        """Slabs of the first layer group, if it had the whole pool."""
        return self._slabs[0].num_slabs

    def idle_slabs(self) -> tuple[int, ...]:
        """Slabs of the first layer group that are mapped in rows without a request."""
        live = {row.index for row in self.live.values()}
        return tuple(slab for row in self._rows if row.index not in live for slab in row.slabs[0])

    def page_groups_for(self, length: int) -> int:
        """Page-groups that a sequence of `length` tokens needs, over all tensors."""
        return sum(g.num_tensors * g.slabs_for(length) for g in self.geometries)

    def missing(self, row: Row, length: int) -> int:
        """Page-groups that the row lacks for `length` tokens."""
        missing = 0
        for slabs, g in zip(row.slabs, self.geometries, strict=True):
            missing += g.num_tensors * max(0, g.slabs_for(length) - len(slabs))
        return missing

    def obtainable(self, margin: int) -> int:
        """Page-groups that are free, or could be if live rows kept only what `margin` more tokens each need."""
        surplus = sum([self._surplus(row, margin) for row in self._with_surplus.values()])
        return self.total - self.sums.mapped + surplus

    def _surplus(self, row: Row, margin: int) -> int:
        """Page-groups that a row has beyond what `margin`, 0 or 1, more tokens need."""
        return row.surplus_ahead if margin and row.length == row.enough_until else row.surplus

    # ---- who lives where ---------------------------------------------------------------------------------------

    def occupy(self, seq_id: int, length: int, final: int) -> Row:
        """Give a sequence the idle row that fits it best (of an unknown length, 0: the fullest); nothing is mapped."""
        row = self._idle.best_fit(self.page_groups_for(length)) if length else self._idle.fullest()
        self._take_idle(row)
        self._settle_in(row, seq_id, length, final)
        return row

    def _take_idle(self, row: Row) -> None:
        self._idle.remove(row)
        if row is self.slot:
            self.slot = None

    def _settle_in(self, row: Row, seq_id: int, length: int, final: int) -> None:
        self._admissions += 1
        row.seq_id, row.admitted, row.length, row.final = seq_id, self._admissions, length, final
        self.live[seq_id] = row
        self.settle(row)

    def vacate(self, seq_id: int) -> Row:
        """Let the sequence's row go idle, with all that is mapped in it."""
        row = self.live.pop(seq_id)
        self._with_surplus.pop(row.index, None)
        self.sums = self.sums.replaced(row.marks, NOTHING)
        row.seq_id, row.length, row.final, row.marks = None, 0, 0, NOTHING
        self._idle.add(row)
        return row

    def settle(self, row: Row) -> None:
        """Bring the sums up to date after a live row has changed."""
        before = row.marks
        row.settle(self.geometries, self.max_tokens)
        self.sums = self.sums.replaced(before, row.marks)
        if row.surplus:
            self._with_surplus[row.index] = row
        else:
            self._with_surplus.pop(row.index, None)

    # ---- mapping and taking back -------------------------------------------------------------------------------

    def extend(self, row: Row, length: int, actions: list[Action]) -> bool:
        """Map what a live row lacks for `length` tokens, if anything; the caller knows that memory suffices."""
        missing = self.missing(row, length)
        if missing == 0:
            return False
        self._take_back(missing, actions, margins=(1, 0))
        self.map(row, length, actions)
        return True

    def map_ahead(self, actions: list[Action]) -> None:
        """Map one token ahead of every live row that is full, in order of admission, as far as memory lasts.

        What others were mapped for their next iteration is not touched.
        """
        full = self._full()
        missing = [self.missing(row, row.length + 1) for row in full]
        wanted = sum(missing)
        if wanted > self.free and wanted > (left := self.obtainable(margin=1)):
            wanted, rows, full = 0, full, []
            for row, lacking in zip(rows, missing, strict=True):
                if lacking <= left - wanted:
                    full.append(row)
                    wanted += lacking
        self._take_back(wanted, actions, margins=(1,))
        for row in full:
            self.map(row, row.length + 1, actions)

    def missing_ahead(self) -> int:
        """Page-groups that `map_ahead` would map if memory sufficed."""
        return sum([self.missing(row, row.length + 1) for row in self._full()])

    def _full(self) -> list[Row]:
        """Live rows that their next token outgrows."""
        return [row for row in self.live.values() if row.length == row.capacity < self.max_tokens]

    def map(self, row: Row, length: int, actions: list[Action]) -> None:
        """Map what a live row lacks for `length` tokens from what is free."""
        self._attach(row, self._slabs_for(length), actions)
        self.settle(row)

    def prepare_slot(self, spare: int, actions: list[Action]) -> None:
        """Keep the fullest idle row ready, if `spare` page-groups suffice for what it lacks."""
        if self.slot is not None or not self.has_idle:
            return
        row = self._idle.fullest()
        if self._lacking(row, self._slot_slabs) > spare:
            return
        self.slot = row
        self._idle.remove(row)
        self._attach(row, self._slot_slabs, actions)
        self._idle.add(row)

    def take_back_idle(self, wanted: int, actions: list[Action]) -> None:
        """Unmap what idle rows have, the least full first, until `wanted` are free. The slot is kept ready."""
        if self.free >= wanted:
            return
        for row in self._idle.least_full_first():
            self.trim_idle(row, wanted, actions, self._slot_slabs if row is self.slot else self._no_slabs)

    def trim_idle(self, row: Row, wanted: int, actions: list[Action], keep: Seq[int] = ()) -> None:
        """Unmap an idle row's page-groups, `keep` by layer group excepted, until `wanted` are free."""
        self._idle.remove(row)
        self._trim(row, keep or self._no_slabs, wanted, actions)
        self._idle.add(row)

    def _take_back(self, wanted: int, actions: list[Action], margins: tuple[int, ...]) -> None:
        """Unmap until `wanted` are free: idle rows, surplus of live rows, the slot.

        What a live row has been mapped for its next iteration is surplus too, and goes last of it (margin 0).
        """
        self.take_back_idle(wanted, actions)
        for margin in margins:
            if self.free >= wanted:
                return
            with_surplus = [row for row in self._with_surplus.values() if self._surplus(row, margin)]
            for row in sorted(with_surplus, key=lambda row: -row.admitted):
                self._trim(row, self._slabs_for(row.length + margin), wanted, actions)
                self.settle(row)
                if self.free >= wanted:
                    return
        if self.free < wanted and self.slot is not None:
            slot, self.slot = self.slot, None
            self.trim_idle(slot, wanted, actions)

    def _trim(self, row: Row, keep: Seq[int], wanted: int, actions: list[Action]) -> None:
        """Unmap a row's last page-groups, `keep` by layer group excepted, until `wanted` are free."""
        for group, (slabs, g) in enumerate(zip(row.slabs, self.geometries, strict=True)):
            while len(slabs) > keep[group] and self.free < wanted:
                slab = slabs.pop()
                self._slabs[group].give(slab)
                self.free += g.num_tensors
                row.mapped -= g.num_tensors
                actions.append(Unmap(group, row.index, len(slabs), slab))

    def _attach(self, row: Row, want: Seq[int], actions: list[Action]) -> None:
        """Map free slabs at the end of a row, until it has `want` by layer group."""
        for group, (slabs, g) in enumerate(zip(row.slabs, self.geometries, strict=True)):
            while len(slabs) < want[group]:
                slab = self._slabs[group].take(after=slabs[-1] if slabs else None)
                self.free -= g.num_tensors
                row.mapped += g.num_tensors
                actions.append(Map(group, row.index, len(slabs), slab))
                slabs.append(slab)

    def _slabs_for(self, length: int) -> list[int]:
        """Slabs by layer group; a row ends at `max_tokens`."""
        return [g.slabs_for(min(length, self.max_tokens)) for g in self.geometries]

    def _lacking(self, row: Row, want: Seq[int]) -> int:
        """Page-groups that a row lacks to have `want` slabs by layer group."""
        return self._page_groups([max(0, n - len(slabs)) for n, slabs in zip(want, row.slabs, strict=True)])

    def _page_groups(self, slabs: Seq[int]) -> int:
        return sum(n * g.num_tensors for n, g in zip(slabs, self.geometries, strict=True))

    # ---- recounting --------------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Recount slabs, rows and sums. Raises IntegrityError with what differs."""
        for group, slabs in enumerate(self._slabs):
            owned = [slab for row in self._rows for slab in self._owned(row, group)]
            slabs.check_integrity(owned, self._slabs_at_rest(group))
        mapped = [self._page_groups([len(slabs) for slabs in row.slabs]) for row in self._rows]
        expect("page-groups by row", [row.mapped for row in self._rows], mapped)
        owners = sum(self._page_groups([len(self._owned(row, g)) for g in range(len(row.slabs))]) for row in self._rows)
        expect("page-groups mapped + free, an alias once", owners - self.aliased + self.free, self.total)
        expect("page-groups free are none or more", self.free >= 0, True)
        idle = sorted((row.mapped, row.index) for row in self._rows if row.seq_id is None and not self._is_left(row))
        expect("idle rows by page-groups", [(row.mapped, row.index) for row in self._idle], idle)
        needed = 0
        for row in [*self.live.values(), *self.resting.values()]:
            needed += self.page_groups_for(row.length)
            fits = self.missing(row, row.length) == 0 and row.length <= row.capacity
            expect(f"row {row.index} holds its {row.length} tokens", fits, True)
        expect("page-groups that live rows need", self.sums.needed, needed - self.aliased)
        if self.slot is not None:
            expect("the slot lacks page-groups", self._lacking(self.slot, self._slot_slabs), 0)

    def _owned(self, row: Row, group: int) -> list[int]:
        """Slabs that a row owns, alone or with others."""
        return row.slabs[group]

    def _slabs_at_rest(self, group: int) -> list[int]:
        """Slabs of a layer group that rows at rest are kept for, each as often as there is such a row."""
        return []

    def _is_left(self, row: Row) -> bool:
        """Whether a row without a request may not be inherited."""
        return False

    def recounted_leaves(self) -> tuple[int, ...]:
        """live, reserved, over_estimate, rounding, retained: row by row, in bytes."""
        sums = [0] * 5
        for row in self._rows:
            for g, slabs in zip(self.geometries, row.slabs, strict=True):
                final = g.resident_bytes(row.final)
                end = g.slabs_for(row.final) * g.page_group
                leaves = extent_usage(g.resident_bytes(row.length), final, final, end, len(slabs) * g.page_group)
                sums = [total + g.num_tensors * leaf for total, leaf in zip(sums, leaves, strict=True)]
        return tuple(sums)


def expect(what: str, kept: object, recounted: object) -> None:
    """Raise IntegrityError where a recount differs from what was kept."""
    if kept != recounted:
        raise IntegrityError(f"{what}: {kept} kept, {recounted} recounted")
