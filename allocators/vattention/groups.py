"""Groups, forks and prefixes under vAttention: aliases of whole page-groups, a copy of the last part.

A fork maps the parent's page-groups into a row of its own (`aliasing.py` draws it); the page-group in which its
length ends is its own, and gets the parent's part of it once that has been written (`memory/pending_copies.py`). The
paper names aliasing as something that virtual memory allows (section 8.1); it does not say how, and its artifact does
not do it.
"""

from collections.abc import Callable, Hashable, Iterable
from collections.abc import Sequence as Seq

from kvarena.allocators.actions import Action, CopyRow
from kvarena.allocators.forking import forked_again, resident_prefix
from kvarena.allocators.memory.pending_copies import DueCopies
from kvarena.allocators.policy import Admission, NotResidentError, Policy, Sequence
from kvarena.allocators.vattention.aliasing import SharedRows
from kvarena.allocators.vattention.page_groups import RowGeometry
from kvarena.allocators.vattention.row import Row


class RowGroups(Policy):
    """What VAttentionPolicy does with several sequences at once."""

    max_tokens: int
    max_rows: int
    page_group_bytes: int
    copy_beams: bool
    deferred_reclamation: bool
    geometries: tuple[RowGeometry, ...]
    _rows: SharedRows
    _watermark: int  # page-groups
    _actions: list[Action]
    _looked_ahead: bool
    _live_bytes: int
    _bytes_of: Callable[[int], int]

    def __init__(self) -> None:
        self._due = DueCopies(self._copies)
        self._prefixes: dict[int, Sequence] = {}  # that are kept, by id
        self.sharing = self

    def refusal(self, admission: Admission) -> str:
        """There must be rows, and page-groups beside the watermark, for the members at their ends, so that they may
        return after any preemption. They surely share what lies wholly below their prompt, and below the end of their
        prefix.
        """
        gang, page_groups_for = admission.gang, self._rows.page_groups_for
        shared = self._shared_below(min([seq.prompt_tokens for seq in gang]))
        needed = shared + sum([page_groups_for(seq.final_tokens) - shared for seq in gang])
        for prefix_id, prefix in self._prefixes.items():
            in_common = self._shared_below(prefix.prompt_tokens) if prefix_id == admission.prefix else 0
            needed += page_groups_for(prefix.prompt_tokens) - in_common
        have_rows = len(gang) + len(self._prefixes) <= self.max_rows
        in_context = max([seq.final_tokens for seq in gang]) <= self.max_tokens
        fits = have_rows and in_context and needed + self._watermark <= self._rows.total
        return "" if fits else self._never_fits(admission)

    def _shared_below(self, tokens: int) -> int:
        """Page-groups that a fork of a sequence of so many tokens shares with it."""
        return self._rows.page_groups_for(tokens) - self._rows.page_groups_to_fork(tokens)

    def can_admit(self, admission: Admission) -> bool:
        """Whether a row is idle for each member, and page-groups for one, and for what the others have of their own.

        Those that come back need them for their own positions too, and the next.
        """
        gang, tokens, own, _, _ = admission
        if tokens > self.max_tokens:
            return False
        needed = self._rows.page_groups_for(tokens)
        if own:
            shared = self._shared_below(tokens)
            needed = shared + len(gang) * (self._rows.page_groups_for(tokens + own + 1) - shared)
        elif len(gang) > 1:
            needed += (len(gang) - 1) * self._rows.page_groups_to_fork(tokens)
        return self._fits(needed - self._already_there(admission) + self._watermark, len(gang))

    def _already_there(self, admission: Admission) -> int:
        """Page-groups that an admission need not take."""
        if admission.prefix is None:
            return 0
        length = self._resident(admission.prefix)
        if length > admission.tokens:
            raise ValueError(f"a prefix of {length} tokens in a prompt of {admission.tokens}")
        return self._shared_below(length)

    def admit(self, admission: Admission) -> int | None:
        """Give the first member an idle row and map what it lacks, or begin with what is found; fork the others."""
        if not self.can_admit(admission):
            return None
        first, *others = admission.gang
        held = self._begin(first, admission)
        if held:
            self.grow(first.seq_id, admission.tokens - held)
        else:
            self._occupy(first, admission.tokens)
        self.keep(first.seq_id, admission.names)
        for seq in others:
            self.fork(first.seq_id, seq)
        return held

    def _begin(self, first: Sequence, admission: Admission) -> int:
        """Let a sequence begin with its prefix, if it has one. Returns the tokens that this holds."""
        if admission.prefix is None:
            return 0
        self.fork(admission.prefix, first)
        return self._rows.live[first.seq_id].length

    def _occupy(self, seq: Sequence, tokens: int) -> None:
        """Give a sequence an idle row with room for `tokens`."""

    def keep(self, seq_id: int, names: Seq[Hashable]) -> None:
        """Let what a sequence holds be found."""

    def keep_prefix(self, prefix_id: int, tokens: int) -> None:
        """Admit a prefix, and remember it."""
        self._prefixes[prefix_id] = resident_prefix(self, prefix_id, tokens)

    def grow_gang(self, seq_ids: Seq[int]) -> bool:
        """One position for each, if the page-groups that all of them need suffice."""
        rows = [self._rows.live[seq_id] for seq_id in seq_ids]
        if any([row.length >= self.max_tokens for row in rows]):
            return False
        full = [row for row in rows if row.length >= row.enough_until]
        more = sum([self._rows.page_groups_for(row.length + 1) - row.marks.needed for row in full])
        return self._fits(more) and self.grow_each(seq_ids) == len(seq_ids)

    def fork(self, parent_id: int, child: Sequence) -> bool:
        """Make `child` a copy of a resident sequence, in a row of its own. False where no row is idle, or the
        page-group in which its length ends finds no memory.
        """
        length = self._resident(parent_id)
        if child.seq_id in self._rows.live:
            raise ValueError(f"sequence {child.seq_id} is resident already")
        rows = self._rows
        own = rows.page_groups_to_fork(length)
        if not self._fits(own, 1):
            return False
        self._make_room(own, 1)
        self._due.owe(parent_id, child.seq_id, length, self._actions)
        aliased = rows.aliased
        rows.fork(rows.live[parent_id], child.seq_id, length, child.final_tokens, self._actions)
        self._live_bytes += self._bytes_of(length) - (rows.aliased - aliased) * self.page_group_bytes
        self._looked_ahead = False
        return True

    def reseat(self, moves: Seq[tuple[int, Sequence]]) -> bool:
        """A child stays in its row, where page-groups that it does not share with its parent make way for the parent's.

        With `copy_beams` they are written over instead, if nobody else has them.
        """
        return forked_again(self, self.fork, [move for move in moves if not self._reseat_in_row(*move)])

    def _reseat_in_row(self, parent_id: int, child: Sequence) -> bool:
        length, rows = self._resident(parent_id), self._rows
        parent, row = rows.live[parent_id], rows.live[child.seq_id]
        if (row.length, row.final) != (length, child.final_tokens) or self.cache is not None:
            return False
        self._leave(child.seq_id)
        if not (self.copy_beams and rows.owns_alone(row, length, rows.in_place(row, parent, length))):
            aliased = rows.aliased
            rows.follow(row, parent, length, self._actions)
            self._live_bytes -= (rows.aliased - aliased) * self.page_group_bytes
            self._looked_ahead = False
        self._due.owe(parent_id, child.seq_id, length, self._actions)
        return True

    @property
    def shared_bytes(self) -> int:
        """Page-groups that several rows map, counted beyond the first time."""
        return self._rows.aliased * self.page_group_bytes

    def _fits(self, page_groups: int, rows: int = 0) -> bool:
        """Whether so many more page-groups, and idle rows, are free or can be taken back."""
        return rows <= self._rows.num_idle and self._rows.sums.needed + page_groups <= self._rows.total

    def _make_room(self, page_groups: int, rows: int = 0) -> None:
        """Give up what is only kept, as far as that takes."""

    def _resident(self, seq_id: int) -> int:
        """Length of a resident sequence."""
        if seq_id not in self._rows.live:
            raise NotResidentError(seq_id)
        return self._rows.live[seq_id].length

    def _copies(self, source_id: int, target_id: int, tokens: int) -> Iterable[CopyRow]:
        """What the child does not map as the parent does, up to `tokens`."""
        source, target = self._rows.live[source_id], self._rows.live[target_id]
        for group, (g, same) in enumerate(
            zip(self.geometries, self._rows.in_place(target, source, tokens), strict=True)
        ):
            start, stop = same * g.page_group, g.resident_bytes(tokens)
            if start < stop:
                yield CopyRow(group, source.index, target.index, start, stop)

    def _leave(self, seq_id: int) -> None:
        """Settle what is owed, by and to a sequence that goes."""
        self._due.leave(seq_id, self._actions)
        self._actions = self._due.without_copies_to([self._rows.live[seq_id].index], self._actions)

    def _vacate(self, seq_id: int) -> Row | None:
        """Settle the books of a sequence that goes. Returns its row, unless that does not go idle."""
        length, rows = self._resident(seq_id), self._rows
        self._leave(seq_id)
        aliased = rows.aliased
        row = rows.vacate(seq_id)
        self._live_bytes -= self._bytes_of(length) - (aliased - rows.aliased) * self.page_group_bytes
        return row

    def _give_back(self, row: Row, actions: list[Action]) -> None:
        """An idle row keeps its page-groups, unless reclamation is not deferred."""
        self._looked_ahead = False
        if not self.deferred_reclamation:
            self._rows.trim_idle(row, self._rows.total, actions)
