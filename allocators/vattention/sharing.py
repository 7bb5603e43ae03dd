"""Gangs, beams and kept prefixes under vAttention: aliases of whole page-groups, a copy of the last part.

A fork maps its parent's page-groups into a row of its own (`aliasing.py` draws it). The page-group in which its length
ends is its own, and gets the parent's part of it once that has been written (`memory/pending_copies.py`).

Where a beam dies, a child of another follows in its row: only full page-groups that differ are mapped anew.

    dead     | p0 | p4 | p5..|      p0 is in place, p1 is mapped instead of p4, p5 is written over
"""

from collections.abc import Iterable
from collections.abc import Sequence as Seq

from kvarena.allocators.actions import Action, CopyRow
from kvarena.allocators.forking import Forking
from kvarena.allocators.memory.pending_copies import PendingCopies
from kvarena.allocators.policy import Policy, Sequence
from kvarena.allocators.vattention.aliasing import Aliases
from kvarena.allocators.vattention.prefix_cache import RowCache
from kvarena.allocators.vattention.reclamation import Reclamation
from kvarena.allocators.vattention.rows import Row, Rows


class SharedRows(Forking):
    """What a policy of rows can do with several sequences at once. Actions are appended to the policy's."""

    def __init__(
        self,
        policy: Policy,
        rows: Rows,
        reclamation: Reclamation,
        aliases: Aliases,
        cache: RowCache | None,
        actions: list[Action],
        copy_beams: bool,
    ) -> None:
        """With `copy_beams` a beam's child writes over page-groups that differ, if nobody else has them."""
        super().__init__(policy, self.fork)
        self.pending = PendingCopies(self._copies)
        self.copy_beams = copy_beams
        self._rows = rows
        self._reclamation = reclamation
        self._aliases = aliases
        self._cache = cache
        self._actions = actions

    @property
    def shared_bytes(self) -> int:
        """Page-groups that several rows map, counted beyond the first time."""
        return self._rows.shared * self._rows.geometries[0].page_group

    def grow_gang(self, seq_ids: Seq[int]) -> bool:
        """One position for each, if the page-groups that all of them need suffice."""
        rows = [self._rows.live[seq_id] for seq_id in seq_ids]
        if any([row.length >= self._rows.max_tokens for row in rows]):
            return False
        full = [row for row in rows if row.length >= row.enough_until]
        more = sum([self._rows.page_groups_for(row.length + 1) - row.marks.needed for row in full])
        return self._reclamation.fits(more) and self._policy.grow_each(seq_ids) == len(seq_ids)

    def fork(self, parent_id: int, child: Sequence) -> bool:
        """Make `child` a copy of a resident sequence, in a row of its own. False where no row is idle, or the
        page-group in which its length ends finds no memory.
        """
        parent = self._rows.resident(parent_id)
        if child.seq_id in self._rows.live:
            raise ValueError(f"sequence {child.seq_id} is resident already")
        own = self._aliases.own_of_fork(parent.length)
        if not self._reclamation.fits(own, 1):
            return False
        self._reclamation.make_room(own, 1, self._actions)
        self.pending.owe(parent_id, child.seq_id, parent.length, self._actions)
        self._aliases.fork(parent, child.seq_id, parent.length, child.final_tokens, self._actions)
        if self._cache is not None:
            self._cache.name_as(parent_id, child.seq_id)
        return True

    def reseat(self, moves: Seq[tuple[int, Sequence]]) -> bool:
        """A child stays in its row, where page-groups that differ from its parent's make way for the parent's."""
        return super().reseat([move for move in moves if not self._reseat_in_row(*move)])

    def _reseat_in_row(self, parent_id: int, child: Sequence) -> bool:
        parent, row = self._rows.resident(parent_id), self._rows.live[child.seq_id]
        if (row.length, row.final) != (parent.length, child.final_tokens) or self._cache is not None:
            return False
        self.leave(row)
        if not (self.copy_beams and self._aliases.differ_alone(row, parent)):
            self._aliases.follow(row, parent, self._actions)
        self.pending.owe(parent_id, child.seq_id, row.length, self._actions)
        return True

    def leave(self, row: Row) -> bool:
        """Make the copies that are owed by a sequence that goes, and none to it. Returns whether it was owed any."""
        assert row.seq_id is not None
        is_owed = self.pending.is_owed(row.seq_id)
        self.pending.leave(row.seq_id, self._actions)
        self._actions[:] = self.pending.without_copies_to([row.index], self._actions)
        return is_owed

    def _copies(self, source_id: int, target_id: int, tokens: int) -> Iterable[CopyRow]:
        """What a child does not map as its parent does, up to `tokens`."""
        source, target = self._rows.live[source_id], self._rows.live[target_id]
        for group, same in enumerate(self._aliases.in_place(target, source, tokens)):
            g = self._rows.geometries[group]
            start, stop = same * g.page_group, g.resident_bytes(tokens)
            if start < stop:
                yield CopyRow(group, source.index, target.index, start, stop)
