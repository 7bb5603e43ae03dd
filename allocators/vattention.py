"""vAttention's allocator: a sequence is a row of virtual tensors, backed page-group by page-group as it grows.

Section 5 of the paper (rows, `page_groups.py` draws them) and section 6.1 (the switches):

    overlap                what the next iteration needs is mapped beside this one (6.1.1)
    deferred_reclamation   a row keeps its page-groups when its request ends; the next one inherits them (6.1.2)
    eager_allocation       one idle row, the slot, is kept ready with `eager_groups` per tensor (6.1.3)
    reclaim_threshold      idle rows give back in the background while less than this share of the pool is free
    tensor_slicing         one K and one V tensor over all layers (8.2)

Under pressure memory is taken back in this order: page-groups of idle rows, page-groups of live rows that their
length does not need, the slot. Only then is a request refused, so what can be given depends on one sum alone: the
page-groups that live rows *need*.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from math import gcd

from kvarena.allocators.kv_layout import KVLayout
from kvarena.allocators.ledger import resident_bytes
from kvarena.allocators.page_groups import checked_page_group, row_geometries
from kvarena.allocators.policy import Action, IntegrityError, Map, Policy, Sequence, Unmap
from kvarena.allocators.sizes import format_bytes
from kvarena.allocators.slabs import SlabList
from kvarena.allocators.usage import Usage, extent_usage
from kvarena.allocators.virtual_row import NOTHING, IdleRows, Marks, Row
from kvarena.errors import UserError
from kvarena.kernels.layout import Layout


@dataclass
class VAttentionConfig:
    """conf/allocator/vattention.yaml."""

    name: str = "vattention"
    page_group: str = "2MB"  # 64KB | 128KB | 256KB | 2MB
    max_rows: int = 256  # rows of the virtual tensors: sequences at once
    watermark: float = 0.01  # share of the pool that an admission must leave obtainable
    overlap: bool = True
    deferred_reclamation: bool = True
    eager_allocation: bool = True
    eager_groups: int = 1  # page-groups per tensor of the slot
    reclaim_threshold: float = 0.1  # share of the pool; 0: only on demand
    tensor_slicing: bool = False


class VAttentionPolicy(Policy):
    """Rows and page-groups. A page-group serves any tensor, so nothing is ever stranded."""

    name = "vattention"
    memory_layout = Layout.CONTIGUOUS

    def __init__(
        self,
        kv_layout: KVLayout,
        pool_bytes: int,
        *,
        max_tokens: int,
        max_rows: int = 256,
        page_group: int | str = "2MB",
        watermark: float = 0.01,
        overlap: bool = True,
        deferred_reclamation: bool = True,
        eager_allocation: bool = True,
        eager_groups: int = 1,
        reclaim_threshold: float = 0.1,
        tensor_slicing: bool = False,
    ) -> None:
        """Raises UserError for an option out of range, and for a pool smaller than one slab of each layer group."""
        for option, share in (("watermark", watermark), ("reclaim_threshold", reclaim_threshold)):
            if not 0 <= share < 1:
                raise UserError(f"allocator.{option}: {share} is not in [0, 1)")
        for option, count in (("max_rows", max_rows), ("eager_groups", eager_groups)):
            if count < 1:
                raise UserError(f"allocator.{option}: {count} is not at least 1")
        self.kv_layout = kv_layout
        self.pool_bytes = pool_bytes
        self.max_tokens = max_tokens
        self.max_rows = max_rows
        self.page_group_bytes = checked_page_group(page_group)
        self.tensor_slicing = tensor_slicing
        self.overlap = overlap
        self.deferred_reclamation = deferred_reclamation
        self.geometries = row_geometries(kv_layout, self.page_group_bytes, tensor_slicing)  # by layer group

        tensors = [g.num_tensors for g in self.geometries]
        self._total = pool_bytes // self.page_group_bytes // gcd(*tensors) * gcd(*tensors)  # page-groups
        if self._total < sum(tensors):
            raise UserError(
                f"allocator vattention: a pool of {pool_bytes} bytes does not hold one page-group of "
                f"{format_bytes(self.page_group_bytes)} in each of {sum(tensors)} tensors; use a smaller "
                "allocator.page_group, allocator.tensor_slicing=true, or a larger pool"
            )
        self._watermark = int(watermark * self._total)
        self._threshold = int(reclaim_threshold * self._total)
        self._slabs = [SlabList(self._total // t) for t in tensors]
        self._free = self._total  # page-groups mapped nowhere

        self._rows = [Row(i, [[] for _ in tensors]) for i in range(max_rows)]
        self._live: dict[int, Row] = {}  # by seq_id, in order of admission
        self._with_surplus: dict[int, Row] = {}  # live rows that have more than they need, by row index
        self._idle = IdleRows(self._rows)
        self._slot: Row | None = None  # the idle row kept ready
        self._slot_slabs = [min(eager_groups, g.slabs_for(max_tokens)) for g in self.geometries]
        self._nothing = [0] * len(tensors)
        self._eager = eager_allocation
        self._admissions = 0

        self._bytes_of = resident_bytes(kv_layout)
        self._token_bytes = kv_layout.token_bytes
        self._windowed = any(group.window is not None for group in kv_layout.groups)
        self._live_bytes = 0
        self._sums = NOTHING  # over live rows
        self._actions: list[Action] = []

    # ---- what a sequence may have ------------------------------------------------------------------------------

    def fits_pool(self, seq: Sequence) -> bool:
        """Whether all its page-groups fit beside the watermark, so that it may return after any preemption."""
        final = seq.final_tokens
        return final <= self.max_tokens and self._page_groups_for(final) + self._watermark <= self._total

    def can_admit(self, seq: Sequence, tokens: int) -> bool:
        """Whether a row is idle, and enough page-groups are free or can be taken back."""
        if tokens > self.max_tokens or not self._idle:
            return False
        return self._sums.needed + self._page_groups_for(tokens) + self._watermark <= self._total

    def admit(self, seq: Sequence, tokens: int) -> bool:
        """Give the sequence an idle row. With 0 tokens (a length not yet known) it gets the fullest one."""
        if seq.seq_id in self._live:
            raise ValueError(f"sequence {seq.seq_id} is resident already")
        if not self.can_admit(seq, tokens):
            return False
        row = self._idle.best_fit(self._page_groups_for(tokens)) if tokens else self._idle.fullest()
        self._idle.remove(row)
        if row is self._slot:
            self._slot = None
        self._admissions += 1
        row.seq_id, row.admitted, row.length, row.final = seq.seq_id, self._admissions, tokens, seq.final_tokens
        self._live[seq.seq_id] = row
        self._live_bytes += self._bytes_of(tokens)
        self._settle(row)
        self._extend(row, tokens, self._actions)
        return True

    def can_grow(self, seq_id: int, tokens: int = 1) -> bool:
        """Whether the page-groups that the length needs are mapped, free, or can be taken back."""
        row = self._live[seq_id]
        return self._can_lengthen(row, row.length + tokens)

    def grow(self, seq_id: int, tokens: int = 1) -> bool:
        """Lengthen the sequence, mapping what it needs that was not mapped ahead."""
        row = self._live[seq_id]
        length = row.length + tokens
        needs_no_more = length <= row.enough_until and length <= row.final
        if not needs_no_more and not self._can_lengthen(row, length):
            return False
        if self._windowed:
            self._live_bytes += self._bytes_of(length) - self._bytes_of(row.length)
        else:
            self._live_bytes += tokens * self._token_bytes
        row.length = length
        if not needs_no_more:
            self._settle(row)
            self._extend(row, length, self._actions)
        return True

    def release(self, seq_id: int) -> None:
        """Let the row go idle. It keeps its page-groups, unless reclamation is not deferred."""
        row = self._live.pop(seq_id)
        self._live_bytes -= self._bytes_of(row.length)
        self._with_surplus.pop(row.index, None)
        self._add(row.marks, -1)
        row.seq_id, row.length, row.final, row.marks = None, 0, 0, NOTHING
        if not self.deferred_reclamation:
            self._trim(row, self._nothing, self._total, self._actions)
        self._idle.add(row)

    def length(self, seq_id: int) -> int:
        """Positions that the sequence has been given."""
        return self._live[seq_id].length

    def row(self, seq_id: int) -> int:
        """Index of the sequence's row, the paper's request id: the same as long as it is resident."""
        return self._live[seq_id].index

    def tokens_until_growth(self, seq_id: int) -> int:
        """Tokens that still fit what is mapped in the row."""
        row = self._live[seq_id]
        return row.capacity - row.length

    def quiet_steps(self, seq_ids: Seq[int], limit: int) -> int:
        """With overlap a row is lengthened one step before it is full, so that much sooner is it not quiet."""
        return max(0, super().quiet_steps(seq_ids, limit + self.overlap) - self.overlap)

    # ---- the background ----------------------------------------------------------------------------------------

    def look_ahead(self) -> list[Action]:
        """Map what the next iteration will need, give back, get the slot ready. To be called after `drain`.

        Asked again with nothing changed in between, it plans nothing.
        """
        actions: list[Action] = []
        all_mapped = not self.overlap or self._map_ahead(actions)
        if self._free < self._threshold:
            self._take_back_idle(self._threshold, actions)
        if self._eager and all_mapped and self._slot is None:
            self._prepare_slot(actions)
        return actions

    def drain(self) -> list[Action]:
        """Hand over the page-groups to map and unmap before this step's forward pass."""
        actions, self._actions = self._actions, []
        return actions

    def _map_ahead(self, actions: list[Action]) -> bool:
        """Map one position ahead of every sequence that is about to need it; False where memory is short."""
        all_mapped = True
        for row in self._live.values():
            if row.length == row.capacity < self.max_tokens:
                missing = self._missing(row, row.length + 1)
                obtainable = self._free + self._idle_page_groups
                if missing <= obtainable or missing <= obtainable + self._surplus_beyond(1):
                    self._extend(row, row.length + 1, actions, ahead=1)
                else:
                    all_mapped = False
        return all_mapped

    def _prepare_slot(self, actions: list[Action]) -> None:
        """Keep the fullest idle row ready, if what it lacks leaves the threshold free."""
        if not self._idle:
            return
        row = self._idle.fullest()
        lacks = [max(0, want - len(slabs)) for want, slabs in zip(self._slot_slabs, row.slabs, strict=True)]
        cost = sum(n * g.num_tensors for n, g in zip(lacks, self.geometries, strict=True))
        if cost > self._free - self._threshold:
            return
        self._slot = row
        self._idle.remove(row)
        for group, count in enumerate(lacks):
            self._attach(row, group, count, actions)
        self._idle.add(row)

    # ---- rows and page-groups ----------------------------------------------------------------------------------

    def _extend(self, row: Row, length: int, actions: list[Action], ahead: int = 0) -> None:
        """Map what a live row lacks for `length` tokens; memory is known to suffice."""
        missing = self._missing(row, length)
        if not missing:
            return
        if missing > self._free:
            self._take_back(missing, actions, ahead)
        for group, g in enumerate(self.geometries):
            self._attach(row, group, g.slabs_for(length) - len(row.slabs[group]), actions)
        self._settle(row)

    def _take_back(self, wanted: int, actions: list[Action], ahead: int) -> None:
        """Unmap until `wanted` page-groups are free. What was mapped for the next iteration is surplus too, but goes
        last of it, and not at all for the sake of another row's next iteration (`ahead`).
        """
        self._take_back_idle(wanted, actions)
        for margin in (1,) if ahead else (1, 0):
            if self._free >= wanted:
                return
            for row in sorted(self._with_surplus.values(), key=lambda row: -row.admitted):
                self._trim(
                    row, [g.slabs_for(self._clip(row.length + margin)) for g in self.geometries], wanted, actions
                )
                self._settle(row)
        if self._free < wanted and self._slot is not None:
            slot, self._slot = self._slot, None
            self._trim_idle(slot, self._nothing, wanted, actions)

    def _take_back_idle(self, wanted: int, actions: list[Action]) -> None:
        """Unmap page-groups of idle rows, the least full first, until `wanted` are free; the slot keeps its own."""
        for row in self._idle.least_full_first():
            if self._free >= wanted:
                return
            self._trim_idle(row, self._slot_slabs if row is self._slot else self._nothing, wanted, actions)

    def _trim_idle(self, row: Row, keep: Seq[int], wanted: int, actions: list[Action]) -> None:
        self._idle.remove(row)
        self._trim(row, keep, wanted, actions)
        self._idle.add(row)

    def _trim(self, row: Row, keep: Seq[int], wanted: int, actions: list[Action]) -> None:
        """Unmap the row's last page-groups, `keep` by layer group excepted, until `wanted` are free."""
        for group, g in enumerate(self.geometries):
            slabs = row.slabs[group]
            while len(slabs) > keep[group] and self._free < wanted:
                slab = slabs.pop()
                self._slabs[group].give(slab)
                self._free += g.num_tensors
                row.mapped -= g.num_tensors
                actions.append(Unmap(group, row.index, len(slabs), slab))

    def _attach(self, row: Row, group: int, count: int, actions: list[Action]) -> None:
        """Map `count` more slabs at the end of a row; they are free."""
        slabs = row.slabs[group]
        for _ in range(count):
            slab = self._slabs[group].take(after=slabs[-1] if slabs else None)
            self._free -= self.geometries[group].num_tensors
            row.mapped += self.geometries[group].num_tensors
            actions.append(Map(group, row.index, len(slabs), slab))
            slabs.append(slab)

    def _settle(self, row: Row) -> None:
        """Bring a live row and the sums up to date."""
        self._add(row.marks, -1)
        row.settle(self.geometries, self.max_tokens)
        self._add(row.marks, 1)
        if row.surplus:
            self._with_surplus[row.index] = row
        else:
            self._with_surplus.pop(row.index, None)

    def _add(self, marks: Marks, sign: int) -> None:
        self._sums = Marks(*[total + sign * mark for total, mark in zip(self._sums, marks, strict=True)])

    def _can_lengthen(self, row: Row, length: int) -> bool:
        needed = self._sums.needed - row.marks.needed + self._page_groups_for(self._clip(length))
        return length <= self.max_tokens and needed <= self._total

    def _page_groups_for(self, length: int) -> int:
        """Page-groups of a sequence over all tensors."""
        return sum(g.num_tensors * g.slabs_for(length) for g in self.geometries)

    def _missing(self, row: Row, length: int) -> int:
        """Page-groups that the row lacks for `length` tokens."""
        lacks = (max(0, g.slabs_for(length) - len(s)) for g, s in zip(self.geometries, row.slabs, strict=True))
        return sum(n * g.num_tensors for n, g in zip(lacks, self.geometries, strict=True))

    def _surplus_beyond(self, margin: int) -> int:
        """Page-groups of live rows that they do not need for `margin` more tokens."""
        surplus = 0
        for row in self._with_surplus.values():
            length = self._clip(row.length + margin)
            for g, slabs in zip(self.geometries, row.slabs, strict=True):
                surplus += g.num_tensors * max(0, len(slabs) - g.slabs_for(length))
        return surplus

    def _clip(self, length: int) -> int:
        return min(length, self.max_tokens)

    # ---- the books ---------------------------------------------------------------------------------------------

    @property
    def num_slabs(self) -> int:
        """Slabs of the pool, where the model has one layer group."""
        return self._slabs[0].num_slabs

    @property
    def mapped_bytes(self) -> int:
        """Bytes of page-groups mapped in rows, live or idle."""
        return (self._total - self._free) * self.page_group_bytes

    @property
    def virtual_bytes(self) -> int:
        """Addresses reserved for the virtual tensors."""
        return self.max_rows * sum(g.num_tensors * g.row_bytes(self.max_tokens) for g in self.geometries)

    @property
    def _idle_page_groups(self) -> int:
        """Page-groups of rows without a request, the slot's included."""
        return self._total - self._free - self._sums.mapped

    def usage(self, head: Sequence | None = None) -> Usage:
        """Every byte in one leaf. Nothing is promised, so nothing is over-estimated; nothing is stranded."""
        size = self.page_group_bytes
        premapped = 0
        if self._slot is not None:
            premapped = size * sum(n * g.num_tensors for n, g in zip(self._slot_slabs, self.geometries, strict=True))
        deferred = self._idle_page_groups * size - premapped
        surplus = self._sums.mapped * size - self._sums.rounded
        return Usage(
            live=self._live_bytes,
            reserved=self._sums.covered - self._live_bytes,
            rounding=self._sums.rounded - self._sums.covered,
            retained=deferred + surplus + premapped,
            free=self._free * size,
            remainder=self.pool_bytes - self._total * size,
            deferred=deferred,
            surplus=surplus,
            premapped=premapped,
        )

    def check_integrity(self) -> None:
        """Recount page-groups, rows and leaves from the rows' slabs."""
        for group, slabs in enumerate(self._slabs):
            slabs.check_integrity(slab for row in self._rows for slab in row.slabs[group])
        mapped = [
            sum(g.num_tensors * len(s) for g, s in zip(self.geometries, r.slabs, strict=True)) for r in self._rows
        ]
        _expect("page-groups by row", [row.mapped for row in self._rows], mapped)
        _expect("page-groups free are none or more", self._free >= 0, True)
        _expect("page-groups mapped + free", sum(mapped) + self._free, self._total)
        idle = sorted((row.mapped, row.index) for row in self._rows if row.seq_id is None)
        _expect("idle rows by page-groups", [(row.mapped, row.index) for row in self._idle], idle)
        for row in self._live.values():
            fits = self._missing(row, row.length) == 0 and row.length <= row.capacity
            _expect(f"row {row.index} holds its {row.length} tokens", fits, True)
        _expect("page-groups that live rows need", self._sums.needed, sum(map(self._needed, self._live.values())))
        _expect("leaves", self.usage()[:9], self._recounted_usage()[:9])
        _expect("sum of the leaves", self.usage().pool, self.pool_bytes)

    def _needed(self, row: Row) -> int:
        return self._page_groups_for(row.length)

    def _recounted_usage(self) -> Usage:
        """The leaves, row by row and tensor by tensor."""
        live = reserved = rounding = retained = 0
        for row in self._rows:
            for g, slabs in zip(self.geometries, row.slabs, strict=True):
                final = g.slabs_for(row.final) * g.page_group
                ends = (g.resident_bytes(row.length), g.resident_bytes(row.final), g.resident_bytes(row.final), final)
                leaves = extent_usage(*ends, len(slabs) * g.page_group)
                live += g.num_tensors * leaves[0]
                reserved += g.num_tensors * leaves[1]
                rounding += g.num_tensors * leaves[3]
                retained += g.num_tensors * leaves[4]
        free = self._free * self.page_group_bytes
        remainder = self.pool_bytes - self._total * self.page_group_bytes
        return Usage(live, 0, reserved, 0, rounding, retained, 0, free, remainder)


def _expect(what: str, kept: object, recounted: object) -> None:
    if kept != recounted:
        raise IntegrityError(f"{what}: {kept} kept, {recounted} recounted")
