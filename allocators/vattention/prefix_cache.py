"""A prefix cache of page-groups, for vAttention: a row whose request has ended is kept for what it holds.

    kept     | h0 | h1 | h2 |            whole units of the prompt, by name (`paged/prefix_cache.py`)
    next     | h0 | h1 | h2 |....|       a prompt that goes on from there takes the row over: nothing is mapped
    other    | h0 | h1 |....|            one that goes on from h1 maps h0 and h1 again (`aliasing.py`)

A unit is the least number of tokens that fills whole page-groups. A kept row rests (`kept_rows.py`), and goes, the
least recently used first, when a row or memory is needed. With a sliding window nothing is kept.
"""

from collections import OrderedDict
from collections.abc import Hashable
from collections.abc import Sequence as Seq
from itertools import takewhile
from math import lcm

from kvarena.allocators.policy import Action, Admission, Sequence
from kvarena.allocators.vattention.groups import RowGroups
from kvarena.allocators.vattention.kept_rows import RestingRows
from kvarena.allocators.vattention.row import Row
from kvarena.allocators.vattention.rows import expect

_FIRST_KEPT = -(1 << 40)  # ids of kept rows go down from here: nobody's


class CachedRows(RowGroups):
    """What VAttentionPolicy keeps of sequences that have gone."""

    _rows: RestingRows

    def __init__(self) -> None:
        super().__init__()
        self._kept: OrderedDict[int, None] = OrderedDict()  # ids of kept rows, the next to go first
        self._names: dict[int, list[Hashable]] = {}  # by sequence, resident or kept: names of its leading units
        self._holders: dict[Hashable, dict[int, None]] = {}  # by name: these sequences
        self._next_kept = _FIRST_KEPT

    @property
    def unit_tokens(self) -> int:
        """Tokens of a unit of the cache."""
        return lcm(*(lcm(g.page_group, g.token_stride) // g.token_stride for g in self.geometries))

    # ---- finding -----------------------------------------------------------------------------------------------

    def found_tokens(self, names: Seq[Hashable], tokens: int) -> int:
        """Leading tokens, at most all but one, in page-groups that can be found."""
        return self._found(names, tokens) * self.unit_tokens

    def _already_there(self, admission: Admission) -> int:
        """What is found costs nothing where it stays, and what it takes up where only a kept row has it."""
        units = 0 if admission.own else self._found(admission.names, admission.tokens)
        if not units:
            return super()._already_there(admission)
        holder = self._holder(admission.names, units)
        return self._rows.needed_by_others(self._row_of(holder), units * self.unit_tokens)

    def _begin(self, first: Sequence, admission: Admission) -> int:
        """Take over the row that is found, or map what it holds."""
        units = self._found(admission.names, admission.tokens)
        if not units:
            return super()._begin(first, admission)
        self._begin_with(first, units, self._holder(admission.names, units))
        return units * self.unit_tokens

    def keep(self, seq_id: int, names: Seq[Hashable]) -> None:
        """Let the sequence's whole units be found, as far as there are names."""
        if self.cache is not None and names:
            known = len(self._names.get(seq_id, ()))
            self._know(seq_id, names[known : self._resident(seq_id) // self.unit_tokens])

    def _found(self, names: Seq[Hashable], tokens: int) -> int:
        """Units of the longest prefix that somebody holds; the last token must be fed, for its logits."""
        most = min(len(names), (tokens - 1) // self.unit_tokens) if self._holders else 0
        return sum(takewhile(bool, map(self._holders.__contains__, names[:most])))

    def _holder(self, names: Seq[Hashable], units: int) -> int:
        """Whose row to begin with: a kept one that holds no more, if there is any."""
        holders = self._holders[names[units - 1]]
        return next((i for i in holders if i in self._kept and len(self._names[i]) == units), next(iter(holders)))

    def _row_of(self, holder: int) -> Row:
        """The row of a sequence that is resident, or kept."""
        return self._rows.resting[holder] if holder in self._kept else self._rows.live[holder]

    def _begin_with(self, seq: Sequence, units: int, holder: int) -> None:
        """Let a sequence begin with what the holder's first units hold."""
        if holder in self._kept and len(self._names[holder]) == units:
            self._take_over(seq, units, holder)
            return
        length = units * self.unit_tokens
        own = self._rows.page_groups_to_fork(length)  # for what may be read past them
        if holder in self._kept:
            self._kept.move_to_end(holder)  # the last to make room
        self._make_room(own, 1, but=holder)
        if not super()._fits(own, 1):
            self._take_over(seq, units, holder)
            return
        aliased = self._rows.aliased
        self._rows.fork(self._row_of(holder), seq.seq_id, length, seq.final_tokens, self._actions)
        self._live_bytes += self._bytes_of(length) - (self._rows.aliased - aliased) * self.page_group_bytes
        self._looked_ahead = False

    def _take_over(self, seq: Sequence, units: int, kept_id: int) -> None:
        """Move into a kept row. What it holds beyond the units is given up."""
        self._forget(kept_id)
        del self._kept[kept_id]
        rows, length = self._rows, units * self.unit_tokens
        before, aliased = rows.resting[kept_id].length, rows.aliased
        rows.take_over(kept_id, seq.seq_id, length, seq.final_tokens, self._actions)
        given_up = (aliased - rows.aliased) * self.page_group_bytes  # of what others own too
        self._live_bytes += self._bytes_of(length) - self._bytes_of(before) + given_up
        self._looked_ahead = False

    # ---- keeping -----------------------------------------------------------------------------------------------

    def _vacate(self, seq_id: int) -> Row | None:
        """As of every row; but it is kept, where it holds what no other does."""
        names = self._names.get(seq_id, [])
        self._forget(seq_id)
        length = len(names) * self.unit_tokens
        known_elsewhere = not names or names[-1] in self._holders
        if known_elsewhere or self._due.is_owed(seq_id) or self._rows.shares_past(self._rows.live[seq_id], length):
            return super()._vacate(seq_id)
        self._leave(seq_id)
        self._live_bytes += self._bytes_of(length) - self._bytes_of(self._resident(seq_id))
        kept_id, self._next_kept = self._next_kept, self._next_kept - 1
        self._rows.rest(seq_id, kept_id, length)
        self._looked_ahead = False
        self._kept[kept_id] = None
        self._know(kept_id, names)
        return None

    def _know(self, seq_id: int, names: Seq[Hashable]) -> None:
        """Note what a sequence holds behind what is known of it."""
        if names:
            self._names.setdefault(seq_id, []).extend(names)
            for name in names:
                self._holders.setdefault(name, {})[seq_id] = None

    def _forget(self, seq_id: int) -> None:
        for name in self._names.pop(seq_id, ()):
            del self._holders[name][seq_id]
            if not self._holders[name]:
                del self._holders[name]

    def fork(self, parent_id: int, child: Sequence) -> bool:
        """As in every row; the child may hold what had only been kept, and is found by what its parent is found by."""
        if not super().fork(parent_id, child):
            return False
        self._know(child.seq_id, self._names.get(parent_id, []))
        return True

    # ---- making room -------------------------------------------------------------------------------------------

    def _fits(self, page_groups: int, rows: int = 0) -> bool:
        if super()._fits(page_groups, rows):
            return True
        if not self._kept or rows > self._rows.num_idle + len(self._kept):
            return False
        return self._rows.sums.needed - self._rows.needed_at_rest + page_groups <= self._rows.total

    def _make_room(self, page_groups: int, rows: int = 0, but: int | None = None) -> None:
        while self._kept and next(iter(self._kept)) != but and not super()._fits(page_groups, rows):
            self._give_up_oldest(self._actions)

    def _make_room_ahead(self, actions: list[Action]) -> None:
        """Give up kept rows for what live ones need in the next iteration, so that it is mapped beside this one."""
        if self._kept and (wanted := self._rows.missing_ahead()) > self._rows.free:
            while self._kept and wanted > self._rows.obtainable(margin=1):
                self._give_up_oldest(actions)

    def _give_up_oldest(self, actions: list[Action]) -> None:
        oldest, _ = self._kept.popitem(last=False)
        self._forget(oldest)
        self._rows.wake(oldest)
        row = super()._vacate(oldest)
        assert row is not None
        self._give_back(row, actions)

    @property
    def _cached_bytes(self) -> int:
        """K/V that can only be found."""
        return self._rows.held_at_rest * self.page_group_bytes if self._kept else 0

    def _check_cache(self) -> None:
        """Recount names and holders."""
        holders: dict[Hashable, dict[int, None]] = {}
        for seq_id, names in self._names.items():
            for name in names:
                holders.setdefault(name, {})[seq_id] = None
        expect("holders of names", self._holders, holders)
        expect("kept rows", set(self._kept), set(self._rows.resting))
