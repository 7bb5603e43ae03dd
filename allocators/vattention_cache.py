"""A prefix cache of page-groups, for vAttention: a row whose request has ended is kept for what it holds.

    kept     | h0 | h1 | h2 |            whole units of the prompt, by name (`prefix_cache.py`)
    next     | h0 | h1 | h2 |....|       a prompt that goes on from there takes the row over: nothing is mapped
    other    | h0 | h1 |....|            one that goes on from h1 maps h0 and h1 again (`shared_rows.py`)

A unit is the least number of tokens that fills whole page-groups. A kept row is in the books a live row at rest, and
goes, the least recently used first, when a row or memory is needed. With a sliding window nothing is kept.
"""

from collections import Counter, OrderedDict
from collections.abc import Hashable
from collections.abc import Sequence as Seq
from math import lcm

from kvarena.allocators.policy import Sequence
from kvarena.allocators.vattention_groups import RowGroups
from kvarena.allocators.virtual_row import Row
from kvarena.allocators.virtual_rows import expect

_FIRST_KEPT = -(1 << 40)  # ids of kept rows go down from here: nobody's


class CachedRows(RowGroups):
    """What VAttentionPolicy keeps of sequences that have gone."""

    prefix_cache: bool

    def __init__(self) -> None:
        super().__init__()
        self._kept: OrderedDict[int, None] = OrderedDict()  # ids of kept rows, the next to go first
        self._names: dict[int, list[Hashable]] = {}  # by sequence, resident or kept: names of its leading units
        self._holders: dict[Hashable, dict[int, None]] = {}  # by name: these sequences
        self._next_kept = _FIRST_KEPT
        self._counted: tuple[int, int] | None = None  # `_only_kept`, as long as nothing changes hands

    @property
    def unit_tokens(self) -> int:
        """Tokens of a unit of the cache."""
        return lcm(*(lcm(g.page_group, g.token_stride) // g.token_stride for g in self.geometries))

    @property
    def cache_unit_tokens(self) -> int | None:
        """`unit_tokens`, where rows are kept."""
        return self.unit_tokens if self.prefix_cache and not self.kv_layout.has_windows else None

    # ---- finding -----------------------------------------------------------------------------------------------

    def cached_tokens(self, names: Seq[Hashable], tokens: int) -> int:
        """Leading tokens, at most all but one, in page-groups that can be found."""
        return self._found(names, tokens) * self.unit_tokens

    def can_admit_cached(self, seqs: Seq[Sequence], tokens: int, names: Seq[Hashable]) -> bool:
        """Whether there are rows, and page-groups for what no resident sequence holds already."""
        if tokens > self.max_tokens:
            return False
        units = self._found(names, tokens)
        needed = self._rows.page_groups_for(tokens) + (len(seqs) - 1) * self._rows.page_groups_to_fork(tokens)
        if units:  # what is found costs nothing where it stays, and what it takes up where only a kept row has it
            holder = self._holder(names, units, len(seqs))
            needed -= self._held_by_residents(self._rows.live[holder], units)
        return self._fits(needed + self._watermark, len(seqs))

    def admit_cached(self, seqs: Seq[Sequence], tokens: int, names: Seq[Hashable]) -> int | None:
        """Take over the row that is found, or map what it holds; the rest can be found from now on."""
        if not self.can_admit_cached(seqs, tokens, names):
            return None
        first, *others = seqs
        units = self._found(names, tokens)
        if units:
            self._begin(first, units, self._holder(names, units, len(seqs)))
            self.grow(first.seq_id, tokens - units * self.unit_tokens)
        else:
            self.admit(first, tokens)
        self.cache_blocks(first.seq_id, names)
        for seq in others:
            self.fork(first.seq_id, seq)
        return units * self.unit_tokens

    def cache_blocks(self, seq_id: int, names: Seq[Hashable]) -> None:
        """Let the sequence's whole units be found, as far as there are names."""
        if self.prefix_cache and not self.kv_layout.has_windows:
            self._forget(seq_id)
            self._know(seq_id, list(names[: self._resident(seq_id) // self.unit_tokens]))

    def _found(self, names: Seq[Hashable], tokens: int) -> int:
        """Units of the longest prefix that somebody holds; the last token must be fed, for its logits."""
        most = min(len(names), (tokens - 1) // self.unit_tokens) if self._holders else 0
        units = 0
        while units < most and names[units] in self._holders:
            units += 1
        return units

    def _holder(self, names: Seq[Hashable], units: int, rows: int) -> int:
        """Whose row to begin with: a kept one that holds no more, if there is any."""
        holders = self._holders[names[units - 1]]
        return next((i for i in holders if i in self._kept and len(self._names[i]) == units), next(iter(holders)))

    def _begin(self, seq: Sequence, units: int, holder: int) -> None:
        """Let a sequence begin with what the holder's first units hold."""
        last_row = not self._rows.num_idle and len(self._kept) == 1
        if holder in self._kept and (len(self._names[holder]) == units or last_row):
            self._take_over(seq, units, holder)
            return
        if holder in self._kept:
            self._kept.move_to_end(holder)
        self._make_room(0, 1)
        self._counted = None
        aliased, length = self._rows.aliased, units * self.unit_tokens
        self._rows.fork(self._rows.live[holder], seq.seq_id, length, seq.final_tokens, self._actions)
        self._live_bytes += self._bytes_of(length) - (self._rows.aliased - aliased) * self.page_group_bytes
        self._looked_ahead = False

    def _take_over(self, seq: Sequence, units: int, kept_id: int) -> None:
        """Move into a kept row. What it holds beyond the units is given up."""
        self._forget(kept_id)
        del self._kept[kept_id]
        self._rest(kept_id, seq.seq_id, units * self.unit_tokens, seq.final_tokens).kept = False

    # ---- keeping -----------------------------------------------------------------------------------------------

    def _vacate(self, seq_id: int) -> Row | None:
        """As of every row; but it is kept, where it holds what no other does."""
        self._counted = None
        names = self._names.get(seq_id, [])
        self._forget(seq_id)
        length = len(names) * self.unit_tokens
        known_elsewhere = not names or names[-1] in self._holders
        if known_elsewhere or self._due.is_owed(seq_id) or self._rows.shares_past(self._rows.live[seq_id], length):
            return super()._vacate(seq_id)
        self._leave(seq_id)
        kept_id, self._next_kept = self._next_kept, self._next_kept - 1
        self._rest(seq_id, kept_id, length, length).kept = True
        self._kept[kept_id] = None
        self._know(kept_id, names)
        return None

    def _rest(self, old_id: int, new_id: int, length: int, final: int) -> Row:
        """Give a row to another sequence, which has `length` tokens of the one before."""
        self._counted = None
        self._looked_ahead = False
        before, aliased = self._rows.live[old_id].length, self._rows.aliased
        row = self._rows.hand_over(old_id, new_id, length, final, self._actions)
        given_up = (aliased - self._rows.aliased) * self.page_group_bytes
        self._live_bytes += self._bytes_of(length) - self._bytes_of(before) + given_up
        return row

    def _know(self, seq_id: int, names: list[Hashable]) -> None:
        if names:
            self._names[seq_id] = names
            for name in names:
                self._holders.setdefault(name, {})[seq_id] = None

    def _forget(self, seq_id: int) -> None:
        for name in self._names.pop(seq_id, ()):
            del self._holders[name][seq_id]
            if not self._holders[name]:
                del self._holders[name]

    def fork(self, parent_id: int, child: Sequence) -> bool:
        """As in every row; the child may hold what had only been kept, and is found by what its parent is found by."""
        self._counted = None
        if not super().fork(parent_id, child):
            return False
        self._know(child.seq_id, self._names.get(parent_id, []).copy())
        return True

    # ---- making room -------------------------------------------------------------------------------------------

    def _fits(self, page_groups: int, rows: int = 0) -> bool:
        if super()._fits(page_groups, rows):
            return True
        if not self._kept or rows > self._rows.num_idle + len(self._kept):
            return False
        return self._rows.sums.needed - self._only_kept()[0] + page_groups <= self._rows.total

    def _make_room(self, page_groups: int, rows: int = 0) -> None:
        while self._kept and not super()._fits(page_groups, rows):
            oldest, _ = self._kept.popitem(last=False)
            self._forget(oldest)
            self._rows.live[oldest].kept = False
            self._counted = None
            row = super()._vacate(oldest)
            assert row is not None
            self._give_back(row)

    def _only_kept(self) -> tuple[int, int]:
        """Page-groups that kept rows need and no resident sequence: all, and those that hold K/V."""
        if self._counted is None:
            self._counted = self._count_only_kept()
        return self._counted

    def _count_only_kept(self) -> tuple[int, int]:
        needed = whole = 0
        for group, g in enumerate(self.geometries):
            kept: Counter[int] = Counter()
            full = set()
            for kept_id in self._kept:
                row = self._rows.live[kept_id]
                kept.update(row.slabs[group][: g.slabs_for(row.length)])
                full.update(row.slabs[group][: self._rows.shareable(row.length)[group]])
            alone = {slab for slab, count in kept.items() if count == self._rows.owners(group, slab)}
            needed += g.num_tensors * len(alone)
            whole += g.num_tensors * len(alone & full)
        return needed, whole

    def _held_by_residents(self, row: Row, units: int) -> int:
        """Page-groups of a row's first units that a resident sequence holds too."""
        held = 0
        for group, count in enumerate(self._rows.shareable(units * self.unit_tokens)):
            for slab in row.slabs[group][:count]:
                kept = sum(slab in self._rows.live[kept_id].slabs[group] for kept_id in self._kept)
                held += self.geometries[group].num_tensors * (self._rows.owners(group, slab) > kept)
        return held

    @property
    def _cached_bytes(self) -> int:
        """K/V that can only be found."""
        return self._only_kept()[1] * self.page_group_bytes if self._kept else 0

    def _check_cache(self) -> None:
        """Recount names and holders."""
        holders: dict[Hashable, dict[int, None]] = {}
        for seq_id, names in self._names.items():
            for name in names:
                holders.setdefault(name, {})[seq_id] = None
        expect("holders of names", self._holders, holders)
        expect("page-groups that are only kept", self._only_kept(), self._count_only_kept())
        expect("kept rows", set(self._kept), {row.seq_id for row in self._rows.live.values() if row.kept})
