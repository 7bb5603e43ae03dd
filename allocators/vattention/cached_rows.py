"""Rows that the prefix cache keeps for what they hold, when their sequence has gone (`prefix_cache.py`).

    sequence 7 ends    | p0 | p1 | p2..|        cached row       | p0 | p1 |......     whole page-groups count
    sequence 9         | p0 | p1 | p3..|        took it over: nothing is mapped again

In the sums a cached row is a row in use that does not grow. Owners know how many of them are cached, so that keeping,
restoring and the sums cost what they touch, however many rows are cached.
"""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable

from kvarena.allocators.actions import Action
from kvarena.allocators.integrity import expect
from kvarena.allocators.vattention.aliasing import Aliases
from kvarena.allocators.vattention.reclamation import Reclamation
from kvarena.allocators.vattention.rows import Row, Rows


class CachedRows:
    """Cached rows, by an id that each has in place of its sequence's."""

    def __init__(self, rows: Rows, reclamation: Reclamation, aliases: Aliases, forget: Callable[[int], None]) -> None:
        """`forget` is told of an id before its row goes."""
        self._forget = forget
        self.by_id: OrderedDict[int, Row] = OrderedDict()  # the next to go first
        self._rows = rows
        self._reclamation = reclamation
        self._aliases = aliases
        self._past_end = 0  # page-groups that cached rows need past what they hold (`read_past`)
        self._untrimmed: dict[int, Row] = {}  # by id: may have more than they need

    @property
    def num_rows(self) -> int:
        """How many rows are cached."""
        return len(self.by_id)

    @property
    def oldest(self) -> int | None:
        """Id of the row to go first, the least recently used."""
        return next(iter(self.by_id), None)

    @property
    def held(self) -> int:
        """Page-groups of K/V that only cached rows own."""
        return self._rows.over_tensors([owners.num_cached for owners in self._aliases.owners])

    @property
    def needed(self) -> int:
        """Page-groups that would not be needed if no row were cached."""
        return self.held + self._past_end

    def needed_by_others(self, row: Row, length: int) -> int:
        """Page-groups wholly below `length` that a row which is not cached owns, of those that `row` begins with.

        Who owns a page-group of a row owns all before it, so these come first.
        """
        by_group = zip(self._aliases.owners, row.page_groups, self._aliases.shareable(length), strict=True)
        return self._rows.over_tensors(
            [bisect_left(mapped, True, 0, count, key=owners.is_cached) for owners, mapped, count in by_group]
        )

    def shares_past(self, row: Row, length: int) -> bool:
        """Whether a row shares more than its first `length` tokens, which fill whole page-groups."""
        by_group = zip(self._aliases.owners, row.page_groups, self._aliases.shareable(length), strict=True)
        return any([len(mapped) > keep and owners.is_shared(mapped[keep]) for owners, mapped, keep in by_group])

    def keep(self, seq_id: int, cached_id: int, length: int) -> None:
        """Cache a live row for its first `length` tokens, which fill whole page-groups. It shares none past them."""
        row = self._rows.live.pop(seq_id)
        self.by_id[cached_id] = self._untrimmed[cached_id] = row
        self._rows.assign(row, cached_id, length, length)
        self._past_end += self._aliases.own_of_fork(length)
        for owners, held in zip(self._aliases.owners, self._held(row), strict=True):
            owners.cache(held)

    def restore(self, cached_id: int) -> Row:
        """Let a row be cached no more: it is in use, and nobody's."""
        row = self.by_id.pop(cached_id)
        self._untrimmed.pop(cached_id, None)
        self._past_end -= self._aliases.own_of_fork(row.length)
        for owners, held in zip(self._aliases.owners, self._held(row), strict=True):
            owners.uncache(held)
        return row

    def take_over(self, cached_id: int, seq_id: int, length: int, final: int, actions: list[Action]) -> None:
        """Let a sequence live in a cached row, with the first `length` tokens that it holds.

        Past them the row gives up its part in what others own too; the caller knows that memory suffices.
        """
        self._forget(cached_id)
        row = self.restore(cached_id)
        self._aliases.give_up_past(row, self._aliases.shareable(length), actions)
        self._rows.occupy(row, seq_id, length, final)
        self._reclamation.extend(row, length, actions)

    def evict(self, actions: list[Action]) -> None:
        """Let the oldest go; its row is without a request."""
        oldest = next(iter(self.by_id))
        self._forget(oldest)
        row = self.restore(oldest)
        self._aliases.leave(row)
        self._reclamation.put(row, actions)

    def trim(self, actions: list[Action]) -> None:
        """Unmap what cached rows do not need: nobody inherits it but who goes on from all that they hold."""
        for row in self._untrimmed.values():
            self._rows.trim(row, self._rows.in_each_tensor(row.length), self._rows.total, actions)
            self._rows.measure(row)
        self._untrimmed.clear()

    def _held(self, row: Row) -> list[list[int]]:
        """Page-groups that a cached row is kept for, by layer group."""
        return [had[:count] for had, count in zip(row.page_groups, self._aliases.shareable(row.length), strict=True)]

    def check_integrity(self) -> None:
        """Recount what cached rows need."""
        past = sum(self._aliases.own_of_fork(row.length) for row in self.by_id.values())
        expect("page-groups needed past the ends of cached rows", self._past_end, past)
