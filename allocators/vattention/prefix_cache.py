"""A prefix cache of page-groups, for vAttention: a row whose request has ended is kept for what it holds.

    cached   | h0 | h1 | h2 |            whole units of the prompt, by name (`paged/prefix_cache.py`)
    next     | h0 | h1 | h2 |....|       a prompt that goes on from there takes the row over: nothing is mapped
    other    | h0 | h1 |....|            one that goes on from h1 maps h0 and h1 again (`aliasing.py`)

A unit is the least number of tokens that fills whole page-groups. Cached rows (`cached_rows.py`) go, the least recently
used first, when a row or memory is needed. With a sliding window nothing is kept.
"""

from collections.abc import Hashable
from collections.abc import Sequence as Seq
from itertools import takewhile
from math import lcm

from kvarena.allocators.actions import Action
from kvarena.allocators.integrity import expect
from kvarena.allocators.policy import Sequence
from kvarena.allocators.vattention.aliasing import Aliases
from kvarena.allocators.vattention.cached_rows import CachedRows
from kvarena.allocators.vattention.reclamation import Reclamation
from kvarena.allocators.vattention.rows import Row, Rows

_FIRST_CACHED = -(1 << 40)  # ids of cached rows go down from here: nobody's


class RowCache:
    """What can be found in rows, live or cached. Actions are appended to the policy's."""

    def __init__(self, rows: Rows, reclamation: Reclamation, aliases: Aliases, actions: list[Action]) -> None:
        self.cached = CachedRows(rows, reclamation, aliases, self._forget)
        self.unit_tokens = lcm(*[lcm(g.page_group, g.token_stride) // g.token_stride for g in rows.geometries])
        self._rows = rows
        self._reclamation = reclamation
        self._aliases = aliases
        self._actions = actions
        self._names: dict[int, list[Hashable]] = {}  # by sequence or cached row: names of its leading units
        self._holders: dict[Hashable, dict[int, None]] = {}  # by name: these
        self._next_id = _FIRST_CACHED

    # ---- finding -----------------------------------------------------------------------------------------------

    def found_tokens(self, names: Seq[Hashable], tokens: int) -> int:
        """Leading tokens, at most all but one, in page-groups that can be found."""
        return self._found(names, tokens) * self.unit_tokens

    def _found(self, names: Seq[Hashable], tokens: int) -> int:
        """Units of the longest prefix that somebody holds; the last token must be fed, for its logits."""
        most = min(len(names), (tokens - 1) // self.unit_tokens) if self._holders else 0
        return sum(takewhile(bool, map(self._holders.__contains__, names[:most])))

    def _holder(self, names: Seq[Hashable], units: int) -> int:
        """Whose row to begin with: a cached one that holds no more, if there is any."""
        holders = self._holders[names[units - 1]]
        return next(
            (i for i in holders if i in self.cached.by_id and len(self._names[i]) == units), next(iter(holders))
        )

    def _row_of(self, holder: int) -> Row:
        """The row of a sequence, or a cached one."""
        return self.cached.by_id[holder] if holder in self.cached.by_id else self._rows.live[holder]

    def page_groups_there(self, names: Seq[Hashable], tokens: int) -> int:
        """Page-groups that a prompt need not take: what is found costs nothing where it stays, and what it takes up
        where only a cached row has it.
        """
        units = self._found(names, tokens)
        if not units:
            return 0
        return self.cached.needed_by_others(self._row_of(self._holder(names, units)), units * self.unit_tokens)

    def begin(self, seq: Sequence, names: Seq[Hashable], tokens: int) -> int:
        """Take over the row that is found, or map what it holds. Returns the tokens that this gives."""
        units = self._found(names, tokens)
        length = units * self.unit_tokens
        if units:
            holder = self._holder(names, units)
            if self._branches_off(holder, units):
                self._aliases.fork(self._row_of(holder), seq.seq_id, length, seq.final_tokens, self._actions)
            else:
                self.cached.take_over(holder, seq.seq_id, length, seq.final_tokens, self._actions)
        return length

    def _branches_off(self, holder: int, units: int) -> bool:
        """Whether a prompt maps in its own row what a holder has, for which room is made; else it takes that row."""
        if holder in self.cached.by_id:
            if len(self._names[holder]) == units:
                return False
            self.cached.by_id.move_to_end(holder)  # the last to make room
        own = self._aliases.own_of_fork(units * self.unit_tokens)  # for what may be read past them
        self._reclamation.make_room(own, 1, self._actions, but=holder)
        return self._reclamation.fits_beside_cache(own, 1)

    # ---- keeping -----------------------------------------------------------------------------------------------

    def keep(self, seq_id: int, names: Seq[Hashable]) -> None:
        """Let the sequence's whole units be found, as far as there are names."""
        known = len(self._names.get(seq_id, ()))
        self._know(seq_id, names[known : self._rows.resident(seq_id).length // self.unit_tokens])

    def name_as(self, parent_id: int, child_id: int) -> None:
        """Let a fork be found by what its parent is found by."""
        self._know(child_id, self._names.get(parent_id, []))

    def keep_row(self, row: Row, *, is_written: bool) -> bool:
        """Keep the row of a sequence that goes, if it holds what no other does, and all of it is written."""
        assert row.seq_id is not None
        names = self._names.get(row.seq_id, [])
        self._forget(row.seq_id)
        length = len(names) * self.unit_tokens
        known_elsewhere = not names or names[-1] in self._holders
        if known_elsewhere or not is_written or self.cached.shares_past(row, length):
            return False
        cached_id, self._next_id = self._next_id, self._next_id - 1
        self.cached.keep(row.seq_id, cached_id, length)
        self._know(cached_id, names)
        return True

    def _know(self, holder: int, names: Seq[Hashable]) -> None:
        """Note what a row holds behind what is known of it."""
        if names:
            self._names.setdefault(holder, []).extend(names)
            for name in names:
                self._holders.setdefault(name, {})[holder] = None

    def _forget(self, holder: int) -> None:
        """Note that a row holds nothing any more."""
        for name in self._names.pop(holder, ()):
            del self._holders[name][holder]
            if not self._holders[name]:
                del self._holders[name]

    def check_integrity(self) -> None:
        """Recount cached rows, names and holders."""
        self.cached.check_integrity()
        holders: dict[Hashable, dict[int, None]] = {}
        for holder, names in self._names.items():
            for name in names:
                holders.setdefault(name, {})[holder] = None
        expect("holders of names", self._holders, holders)
        expect("cached rows without a name", set(self.cached.by_id) - set(self._names), set())
