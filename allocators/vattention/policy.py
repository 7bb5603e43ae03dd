"""vAttention's allocator: a sequence is a row of virtual tensors, backed page-group by page-group as it grows.

Section 5 of the paper draws rows and page-groups (`rows.py`, `page_groups.py`), section 6 has the switches:

    overlap                what the next iteration needs is mapped beside this one (6.1.1, `overlap.py`)
    deferred_reclamation   a row keeps its page-groups when its request ends (6.1.2, `reclamation.py`)
    eager_allocation       one idle row, the slot, is kept ready with `eager_groups` in every tensor (6.1)
    reclaim_threshold      idle rows give back in the background while less than this share of the pool is free
    tensor_slicing         one K and one V tensor over all layers (8.2)

The policy has rows, their reclamation, aliases of their page-groups (`aliasing.py`) for what sequences share
(`sharing.py`), books (`books.py`), and a cache only where it is switched on (`prefix_cache.py`, `cached_rows.py`).
"""

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from kvarena.allocators.holding import Holdings
from kvarena.allocators.kv_layout import KVLayout
from kvarena.allocators.limits import check_counts, check_shares
from kvarena.allocators.policy import Action, Admission, Policy, Sequence
from kvarena.allocators.registry import allocator
from kvarena.allocators.sizes import format_bytes
from kvarena.allocators.usage import Usage
from kvarena.allocators.vattention.aliasing import Aliases
from kvarena.allocators.vattention.books import Books
from kvarena.allocators.vattention.overlap import Overlap
from kvarena.allocators.vattention.page_groups import checked_page_group, page_groups_of, row_geometries
from kvarena.allocators.vattention.prefix_cache import RowCache
from kvarena.allocators.vattention.reclamation import Reclamation
from kvarena.allocators.vattention.rows import Rows
from kvarena.allocators.vattention.sharing import SharedRows
from kvarena.errors import UserError
from kvarena.kernels.layout import Layout

MOST_ROWS = 1 << 20  # a replay has no more sequences at once


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

    def __post_init__(self) -> None:
        """Raises UserError for an option out of range."""
        self.page_group = format_bytes(checked_page_group(self.page_group))
        check_shares(watermark=self.watermark, reclaim_threshold=self.reclaim_threshold)
        check_counts(max_rows=self.max_rows, eager_groups=self.eager_groups)
        if self.max_rows > MOST_ROWS:
            raise UserError(f"allocator.max_rows: {self.max_rows} is not at most {MOST_ROWS}")
        if self.read_past is not None and self.read_past < 0:
            raise UserError(f"allocator.read_past: {self.read_past} is not at least 0, or null")


@allocator(VAttentionConfig())
class VAttentionPolicy(Policy):
    """Sequences in rows. Every page-group serves any tensor, so nothing is ever stranded."""

    name = "vattention"
    memory_layout = Layout.CONTIGUOUS
    sharing: SharedRows
    cache: RowCache | None = None

    def __init__(self, config: VAttentionConfig, kv_layout: KVLayout, pool_bytes: int, max_tokens: int) -> None:
        """Raises UserError for a pool smaller than one page-group in every tensor."""
        self.kv_layout = kv_layout
        self.pool_bytes = pool_bytes
        self.max_tokens = max_tokens
        self.max_rows = config.max_rows
        self.page_group_bytes = checked_page_group(config.page_group)
        self.tensor_slicing = config.tensor_slicing
        self.overlap = config.overlap
        self.geometries = row_geometries(  # by layer group
            kv_layout, self.page_group_bytes, config.tensor_slicing, config.read_past or 0
        )
        page_groups = page_groups_of(pool_bytes, self.geometries)
        threshold = int(config.reclaim_threshold * page_groups)
        slot = config.eager_groups if config.eager_allocation else 0
        self._watermark = int(config.watermark * page_groups)
        self._actions: list[Action] = []  # one list for good: what shares and caches adds to it
        self._ahead: list[Action] = []  # by `advance`, for `look_ahead` to hand over
        self._rows = rows = Rows(self.geometries, page_groups, config.max_rows, max_tokens)
        self._reclamation = reclamation = Reclamation(rows, config.deferred_reclamation, threshold, slot)
        self._aliases = aliases = Aliases(rows, reclamation)
        if config.prefix_cache and not kv_layout.has_windows:
            self.cache = RowCache(rows, reclamation, aliases, self._actions)
            reclamation.cache = self.cache.cached
        self.sharing = SharedRows(self, rows, reclamation, aliases, self.cache, self._actions, config.copy_beams)
        self._overlap = Overlap(rows, reclamation, threshold)
        self._books = Books(rows, reclamation, self.cache, pool_bytes)
        self._closed_form = config.overlap and len(self.geometries) == 1 and not kv_layout.has_windows

    # ---- the life of a sequence --------------------------------------------------------------------------------

    def refusal(self, admission: Admission) -> str:
        """There must be rows, and page-groups beside the watermark, for the members at their ends, so that they may
        return after any preemption. They surely share what lies wholly below their prompt, and below the end of their
        prefix.
        """
        gang, prefixes, page_groups_for = admission.gang, self.sharing.prefixes, self._rows.page_groups_for
        final, shared = gang[0].final_tokens, self._aliases.shared_below(gang[0].prompt_tokens)
        needed = shared + len(gang) * (page_groups_for(final) - shared)
        for prefix_id, prefix in prefixes.items():
            in_common = self._aliases.shared_below(prefix.prompt_tokens) if prefix_id == admission.prefix else 0
            needed += page_groups_for(prefix.prompt_tokens) - in_common
        have_rows = len(gang) + len(prefixes) <= self.max_rows
        fits = have_rows and final <= self.max_tokens and needed + self._watermark <= self._rows.total
        return "" if fits else self._never_fits(admission)

    def can_admit(self, admission: Admission) -> bool:
        """Whether a row is idle for each member, and enough page-groups are free or can be taken back."""
        if admission.tokens > self.max_tokens:
            return False
        return self._reclamation.fits(self._page_groups_to_admit(admission) + self._watermark, len(admission.gang))

    def _page_groups_to_admit(self, admission: Admission) -> int:
        """Page-groups for one member, and for what the others have of their own, but for what is there already.

        Members that come back need them for their own positions too, and the next.
        """
        gang, tokens, own, prefix, names = admission
        needed = self._rows.page_groups_for(tokens)
        if own:
            shared = self._aliases.shared_below(tokens)
            needed = shared + len(gang) * (self._rows.page_groups_for(tokens + own + 1) - shared)
        elif len(gang) > 1:
            needed += (len(gang) - 1) * self._aliases.own_of_fork(tokens)
        if prefix is not None:
            if (length := self._rows.resident(prefix).length) > tokens:
                raise ValueError(f"a prefix of {length} tokens in a prompt of {tokens}")
            needed -= self._aliases.shared_below(length)
        elif names and not own and self.cache is not None:
            needed -= self.cache.page_groups_there(names, tokens)
        return needed

    def admit(self, admission: Admission) -> int | None:
        """Give the first member an idle row and map what it lacks, or begin with what is found; fork the others."""
        if not self.can_admit(admission):
            return None
        gang, tokens, _, _, names = admission
        held = self._begin(gang[0], admission)
        if held:
            self.grow(gang[0].seq_id, tokens - held)
        else:
            self._occupy(gang[0], tokens)
        if names and self.cache is not None:
            self.cache.keep(gang[0].seq_id, names)
        for seq in gang[1:]:
            self.sharing.fork(gang[0].seq_id, seq)
        return held

    def _begin(self, seq: Sequence, admission: Admission) -> int:
        """Let a sequence begin with its prefix, or with what is found. Returns the tokens that this holds."""
        if admission.prefix is not None:
            self.sharing.fork(admission.prefix, seq)
            return self.length(seq.seq_id)
        if admission.names and self.cache is not None:
            return self.cache.begin(seq, admission.names, admission.tokens)
        return 0

    def _occupy(self, seq: Sequence, tokens: int) -> None:
        """Give a sequence an idle row and map what it lacks. With 0 tokens, a length not yet known, the fullest."""
        if seq.seq_id in self._rows.live:
            raise ValueError(f"sequence {seq.seq_id} is resident already")
        self._reclamation.make_room(self._rows.page_groups_for(tokens), 1, self._actions)
        row = self._reclamation.inherit(tokens, self._actions)
        self._rows.occupy(row, seq.seq_id, tokens, seq.final_tokens)
        self._reclamation.extend(row, tokens, self._actions)

    def grow(self, seq_id: int, tokens: int = 1) -> bool:
        """Lengthen the sequence, mapping what it needs that was not mapped ahead."""
        self.sharing.pending.pay([seq_id], self._actions)
        rows = self._rows
        row = rows.live[seq_id]
        length = row.length + tokens
        if length <= row.capacity:  # what is mapped
            rows.lengthen(row, length)
            return True
        more = rows.page_groups_for(length) - row.marks.needed
        if length > self.max_tokens or not self._reclamation.fits(more):
            return False
        self._reclamation.make_room(more, 0, self._actions)
        rows.lengthen(row, length)
        self._reclamation.extend(row, length, self._actions)
        return True

    def release(self, seq_id: int) -> None:
        """Let the row go idle; or keep it for what it holds."""
        row, sharing = self._rows.resident(seq_id), self.sharing
        sharing.prefixes.pop(seq_id, None)
        is_written = not (sharing.pending.active and sharing.leave(row))
        if self.cache is not None and self.cache.keep_row(row, is_written=is_written):
            return
        if self._rows.shared:
            self._aliases.leave(row)
        self._reclamation.put(row, self._actions)

    def length(self, seq_id: int) -> int:
        """Positions that the sequence has been given."""
        return self._rows.live[seq_id].length

    def row(self, seq_id: int) -> int:
        """Index of the sequence's row, the paper's request id: the same as long as it is resident."""
        return self._rows.live[seq_id].index

    # ---- once a step -------------------------------------------------------------------------------------------

    def grow_each(self, seq_ids: Seq[int]) -> int:
        """One position for each, in order, up to the first that finds no memory."""
        if self.kv_layout.has_windows:
            return super().grow_each(seq_ids)
        self.sharing.pending.pay(seq_ids, self._actions)
        live, count, within = self._rows.live, 0, 0  # within what their lengths need already
        for seq_id in seq_ids:
            row = live[seq_id]
            if row.length < row.enough_until and row.length < row.final:
                row.length += 1
                within += 1
            elif not self.grow(seq_id):
                break
            count += 1
        self._rows.live_bytes += within * self.kv_layout.token_bytes
        return count

    def drain(self) -> list[Action]:
        """Hand over the page-groups to map and unmap before this step's forward pass."""
        actions = self._actions.copy()
        self._actions.clear()
        self.sharing.pending.handed_over()
        return actions

    def look_ahead(self) -> list[Action]:
        """Map what the next iteration will need, give back, keep the slot ready. To be called after `drain`.

        Asked again with nothing changed in between, it plans nothing.
        """
        actions, self._ahead = self._ahead, []
        self._reclamation.clear_stale(actions)
        if self.cache is not None:
            self.cache.cached.trim(actions)
        if self.overlap:
            self._overlap.map_ahead(actions)
        self._reclamation.in_background(actions)
        self._rows.changed = False
        return actions

    # ---- many steps at once ------------------------------------------------------------------------------------

    def tokens_until_growth(self, seq_id: int) -> int:
        """Tokens that still fit what is mapped in the row."""
        row = self._rows.live[seq_id]
        return row.capacity - row.length

    def quiet_steps(self, seq_ids: Seq[int], limit: int, ahead: int = 0, margin: int = 1) -> int:
        """Steps, `limit` at most. With overlap a row is extended in the step before it would overflow; where that
        must not be (`ahead` = 0), this step is not quiet.
        """
        if self._actions or self.sharing.pending.active or self._rows.changed:
            return 0
        if not (self._closed_form and ahead):
            return max(0, super().quiet_steps(seq_ids, limit + self.overlap) - self.overlap)
        return self._overlap.quiet_steps(seq_ids, limit, ahead)

    def advance(self, seq_ids: Seq[int], steps: int, head: Sequence | None = None) -> Usage:
        """Grow every sequence by `steps` tokens, mapped ahead; the sum of `usage()` over these steps."""
        if not self._closed_form:
            return super().advance(seq_ids, steps, head)
        live, grown = self._rows.live_bytes, len(seq_ids) * self.kv_layout.token_bytes  # in each step
        self._rows.live_bytes += grown * steps
        held = self._overlap.advance(seq_ids, steps, self._ahead)
        return self._books.usage_of(steps * live + grown * (steps * (steps + 1) // 2), held, steps)

    # ---- the books ---------------------------------------------------------------------------------------------

    @property
    def page_groups_per_tensor(self) -> int:
        """Page-groups of each tensor, for a model with one layer group."""
        return self._rows.pools[0].size

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
        return self._books.usage()

    def holdings(self, seqs: Iterable[Sequence]) -> Holdings | None:
        """The page-groups of their rows, for a model with one layer group."""
        return self._books.holdings(seqs)

    def check_integrity(self) -> None:
        """Recount page-groups, rows and leaves from what rows have."""
        self._rows.check_integrity()
        self._reclamation.check_integrity()
        self._aliases.check_integrity([] if self.cache is None else self.cache.cached.by_id.values())
        if self.cache is not None:
            self.cache.check_integrity()
        self._books.check_integrity()
