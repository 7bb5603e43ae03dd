"""vAttention's allocator: a sequence is a row of virtual tensors, backed page-group by page-group as it grows.

Section 5 of the paper draws rows and page-groups (`page_groups.py`), section 6 has the switches:

    overlap                what the next iteration needs is mapped beside this one (6.1.1)
    deferred_reclamation   a row keeps its page-groups when its request ends; the next one inherits them (6.1.2)
    eager_allocation       one idle row, the slot, is kept ready with `eager_groups` in every tensor (6.1)
    reclaim_threshold      idle rows give back in the background while less than this share of the pool is free
    tensor_slicing         one K and one V tensor over all layers (8.2)

Under pressure memory is taken back in this order: page-groups of idle rows, page-groups of live rows that their
length does not need, the slot. Only then is a request refused.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from math import gcd

from kvarena.allocators.holding import Holding, Holdings, Units
from kvarena.allocators.kv_layout import KVLayout
from kvarena.allocators.policy import Action, Sequence
from kvarena.allocators.registry import allocator
from kvarena.allocators.reservation.ledger import resident_bytes
from kvarena.allocators.sizes import format_bytes
from kvarena.allocators.usage import Usage, extent_usage
from kvarena.allocators.vattention.growth import Held, RowGrowth
from kvarena.allocators.vattention.kept_rows import RestingRows
from kvarena.allocators.vattention.page_groups import RowGeometry, checked_page_group, row_geometries
from kvarena.allocators.vattention.prefix_cache import CachedRows
from kvarena.allocators.vattention.row import Row
from kvarena.allocators.vattention.rows import expect
from kvarena.errors import UserError
from kvarena.kernels.layout import Layout


@dataclass
class VAttentionConfig:
    """Rows of virtual tensors, page-groups mapped on demand."""

    name: str = "vattention"
    page_group: str = "2MB"  # physical memory is mapped in units of this: 64KB, 128KB, 256KB or 2MB
    max_rows: int = 256  # rows of the virtual tensors: sequences at once (addresses only, no memory)
    watermark: float = 0.01  # share of the pool that an admission must leave obtainable
    overlap: bool = True  # map what the next iteration needs beside the present one
    deferred_reclamation: bool = True  # a row keeps its page-groups when its request ends; the next one inherits them
    eager_allocation: bool = True  # keep one idle row ready for the next request
    eager_groups: int = 1  # page-groups per tensor of that row
    reclaim_threshold: float = 0.1  # share of the pool: below it, idle rows give back ahead of need; 0: only on demand
    tensor_slicing: bool = False  # one K and one V tensor over all N layers: a page-group has N times fewer tokens
    read_past: int | None = None  # tokens kept mapped past a sequence's end; null: on a GPU the kernel's, else 0
    prefix_cache: bool = False  # find page-groups again by what they hold (docs/design.md)
    copy_beams: bool = False  # where a beam dies, write over its own page-groups: copies, not driver calls


@allocator(VAttentionConfig())
class VAttentionPolicy(CachedRows):
    """Sequences in rows. Every page-group serves any tensor, so nothing is ever stranded."""

    name = "vattention"
    memory_layout = Layout.CONTIGUOUS

    def __init__(
        self,
        kv_layout: KVLayout,
        pool_bytes: int,
        *,
        max_tokens: int,
        page_group: int | str = "2MB",
        max_rows: int = 256,
        watermark: float = 0.01,
        overlap: bool = True,
        deferred_reclamation: bool = True,
        eager_allocation: bool = True,
        eager_groups: int = 1,
        reclaim_threshold: float = 0.1,
        tensor_slicing: bool = False,
        read_past: int | None = None,
        prefix_cache: bool = False,
        copy_beams: bool = False,
    ) -> None:
        """Raises UserError for an option out of range, and for a pool smaller than one page-group in every tensor."""
        for option, share in (("watermark", watermark), ("reclaim_threshold", reclaim_threshold)):
            if not 0 <= share < 1:
                raise UserError(f"allocator.{option}: {share} is not in [0, 1)")
        for option, count in (("max_rows", max_rows), ("eager_groups", eager_groups)):
            if count < 1:
                raise UserError(f"allocator.{option}: {count} is not at least 1")
        super().__init__()
        if read_past is not None and read_past < 0:
            raise UserError(f"allocator.read_past: {read_past} is not at least 0, or null")
        self.kv_layout = kv_layout
        self.pool_bytes = pool_bytes
        self.max_tokens = max_tokens
        self.max_rows = max_rows
        self.page_group_bytes = checked_page_group(page_group)
        self.cache = self if prefix_cache and not kv_layout.has_windows else None
        self.copy_beams = copy_beams
        self.tensor_slicing = tensor_slicing
        self.overlap = overlap
        self.deferred_reclamation = deferred_reclamation
        self.eager_allocation = eager_allocation
        self.geometries = row_geometries(  # by layer group
            kv_layout, self.page_group_bytes, tensor_slicing, read_past or 0
        )

        page_groups = self._page_groups_of_pool()
        self._rows = RestingRows(self.geometries, page_groups, max_rows, max_tokens, eager_groups)
        self._watermark = int(watermark * page_groups)
        self._threshold = int(reclaim_threshold * page_groups)
        self._actions: list[Action] = []
        self._ahead: list[Action] = []  # by `advance`, for `look_ahead` to hand over
        self._looked_ahead = False  # nothing was mapped, taken or given back since
        self._live_bytes = 0
        self._bytes_of = resident_bytes(kv_layout)
        self._token_bytes = kv_layout.token_bytes
        self._growth = RowGrowth(self._rows, self._threshold)
        self._closed_form = overlap and len(self.geometries) == 1 and not kv_layout.has_windows

    def _page_groups_of_pool(self) -> int:
        """Page-groups that can be used: with one layer group, whole slabs."""
        tensors = [g.num_tensors for g in self.geometries]
        page_groups = self.pool_bytes // self.page_group_bytes // gcd(*tensors) * gcd(*tensors)
        if page_groups < sum(tensors):
            raise UserError(
                f"allocator vattention: a pool of {self.pool_bytes} bytes does not hold one page-group of "
                f"{format_bytes(self.page_group_bytes)} in each of {sum(tensors)} tensors; use a smaller "
                "allocator.page_group, allocator.tensor_slicing=true, or a larger pool"
            )
        return page_groups

    # ---- sequences ---------------------------------------------------------------------------------------------

    def _occupy(self, seq: Sequence, tokens: int) -> None:
        """Give the sequence an idle row and map what it lacks. With 0 tokens, a length not yet known, the fullest."""
        if seq.seq_id in self._rows.live:
            raise ValueError(f"sequence {seq.seq_id} is resident already")
        self._make_room(self._rows.page_groups_for(tokens), rows=1)
        self._rows.make_idle(self._actions)
        row = self._rows.occupy(seq.seq_id, tokens, seq.final_tokens)
        self._rows.extend(row, tokens, self._actions)
        self._live_bytes += self._bytes_of(tokens)
        self._looked_ahead = False

    def grow(self, seq_id: int, tokens: int = 1) -> bool:
        """Lengthen the sequence, mapping what it needs that was not mapped ahead."""
        self._due.pay([seq_id], self._actions)
        row = self._rows.live[seq_id]
        length = row.length + tokens
        outgrows = length > row.capacity  # what is mapped
        if outgrows:
            if not self._can_lengthen(row, length):
                return False
            self._make_room(self._rows.page_groups_for(length) - row.marks.needed)
        self._live_bytes += self._bytes_of(length) - self._bytes_of(row.length)
        row.length = length
        if length > row.enough_until or length > row.final:
            self._rows.settle(row)
        if outgrows and self._rows.extend(row, length, self._actions):
            self._looked_ahead = False
        return True

    def release(self, seq_id: int) -> None:
        """Let the row go idle. It keeps its page-groups, unless reclamation is not deferred."""
        self._prefixes.pop(seq_id, None)
        row = self._vacate(seq_id)
        if row is not None:
            self._give_back(row, self._actions)

    def length(self, seq_id: int) -> int:
        """Positions that the sequence has been given."""
        return self._rows.live[seq_id].length

    def row(self, seq_id: int) -> int:
        """Index of the sequence's row, the paper's request id: the same as long as it is resident."""
        return self._rows.live[seq_id].index

    def tokens_until_growth(self, seq_id: int) -> int:
        """Tokens that still fit what is mapped in the row."""
        row = self._rows.live[seq_id]
        return row.capacity - row.length

    def quiet_steps(self, seq_ids: Seq[int], limit: int, ahead: int = 0, margin: int = 1) -> int:
        """Steps, `limit` at most. With overlap a row is extended in the step before it would overflow; where that
        must not be (`ahead` = 0), this step is not quiet.
        """
        if self._actions or self._due or not self._looked_ahead:
            return 0
        if not (self._closed_form and ahead):
            return max(0, super().quiet_steps(seq_ids, limit + self.overlap) - self.overlap)
        return self._growth.quiet_steps(seq_ids, limit, ahead)

    def advance(self, seq_ids: Seq[int], steps: int, head: Sequence | None = None) -> Usage:
        """Grow every sequence by `steps` tokens, mapped ahead; the sum of `usage()` over these steps."""
        if not self._closed_form:
            return super().advance(seq_ids, steps, head)
        live, grown = self._live_bytes, len(seq_ids) * self._token_bytes  # in each step
        self._live_bytes += grown * steps
        held = self._growth.advance(seq_ids, steps, self._ahead)
        return self._usage(steps * live + grown * (steps * (steps + 1) // 2), held, steps)

    def grow_each(self, seq_ids: Seq[int]) -> int:
        """One position for each, in order, up to the first that finds no memory."""
        if self.kv_layout.has_windows:
            return super().grow_each(seq_ids)
        self._due.pay(seq_ids, self._actions)
        live, count, within = self._rows.live, 0, 0  # within what their lengths need already
        for seq_id in seq_ids:
            row = live[seq_id]
            if row.length < row.enough_until and row.length < row.final:
                row.length += 1
                within += 1
            elif not self.grow(seq_id):
                break
            count += 1
        self._live_bytes += within * self._token_bytes
        return count

    def _can_lengthen(self, row: Row, length: int) -> bool:
        more = self._rows.page_groups_for(length) - row.marks.needed
        return length <= self.max_tokens and self._fits(more)

    # ---- driver calls ------------------------------------------------------------------------------------------

    def drain(self) -> list[Action]:
        """Hand over the page-groups to map and unmap before this step's forward pass."""
        actions, self._actions = self._actions, []
        self._due.handed_over()
        return actions

    def look_ahead(self) -> list[Action]:
        """Map what the next iteration will need, give back, keep the slot ready. To be called after `drain`.

        Asked again with nothing changed in between, it plans nothing.
        """
        actions, self._ahead = self._ahead, []
        self._rows.clear_left(actions)
        self._rows.trim_resting(actions)
        if self.overlap:
            self._make_room_ahead(actions)
            self._rows.map_ahead(actions)
        self._rows.take_back_idle(self._threshold, actions)
        if self.eager_allocation:
            self._rows.prepare_slot(self._rows.free - self._threshold, actions)
        self._looked_ahead = True
        return actions

    # ---- the books ---------------------------------------------------------------------------------------------

    @property
    def num_slabs(self) -> int:
        """Slabs of the pool, for a model with one layer group."""
        return self._rows.num_slabs

    def holdings(self, seqs: Iterable[Sequence]) -> Holdings | None:
        """The slabs of their rows, those that they share too; and those of rows without a request: deferred, or
        pre-mapped. For a model with one layer group.
        """
        if len(self.geometries) > 1:
            return None
        [g] = self.geometries
        units = Units("page-group in every tensor", self.num_slabs, g.page_group / g.token_stride)
        return Holdings(units, {seq.seq_id: self._holding(seq, g) for seq in seqs}, self._rows.idle_slabs())

    def _holding(self, seq: Sequence, g: RowGeometry) -> Holding:
        row = self._rows.live[seq.seq_id]
        [slabs] = row.slabs
        final, end = g.resident_bytes(seq.final_tokens), g.slabs_for(seq.final_tokens) * g.page_group
        leaves = extent_usage(g.resident_bytes(row.length), final, final, end, len(slabs) * g.page_group)
        return Holding(row.length, tuple(slabs), tuple(g.num_tensors * leaf for leaf in leaves))

    @property
    def mapped_bytes(self) -> int:
        """Bytes of page-groups mapped in rows, live or idle."""
        return (self._rows.total - self._rows.free) * self.page_group_bytes

    @property
    def virtual_bytes(self) -> int:
        """Addresses reserved for the virtual tensors."""
        return self.max_rows * sum(g.num_tensors * g.row_bytes(self.max_tokens) for g in self.geometries)

    def usage(self, head: Sequence | None = None) -> Usage:
        """Every byte in one leaf."""
        sums = self._rows.sums
        return self._usage(self._live_bytes, Held(*sums[1:], self._rows.deferred), 1)

    def _usage(self, live: int, held: Held, steps: int) -> Usage:
        """Leaves, summed over steps. Nothing is promised, so nothing is over-estimated."""
        size, rows = self.page_group_bytes, self._rows
        mapped, covered, rounded, deferred = held
        premapped = rows.premapped * steps
        free = rows.total * steps - mapped - deferred - premapped
        surplus = mapped * size - rounded
        cached = self._cached_bytes * steps
        return Usage(
            live=live - cached,
            cached=cached,
            reserved=covered - live,
            rounding=rounded - covered,
            retained=(deferred + premapped) * size + surplus,
            free=free * size,
            remainder=(self.pool_bytes - rows.total * size) * steps,
            deferred=deferred * size,
            surplus=surplus,
            premapped=premapped * size,
        )

    def check_integrity(self) -> None:
        """Recount page-groups, rows and leaves from the rows' slabs."""
        self._rows.check_integrity()
        self._check_cache()
        usage = self.usage()
        expect("live to retained", usage[:6], self._recounted())
        expect("deferred + surplus + premapped", usage.deferred + usage.surplus + usage.premapped, usage.retained)
        expect("leaves are none or more", min(usage) >= 0, True)
        expect("sum of the leaves", usage.pool, self.pool_bytes)

    def _recounted(self) -> tuple[int, ...]:
        live, *others, retained = self._rows.recounted_leaves()
        return (live - self._cached_bytes, self._cached_bytes, *others, retained)
