"""What all reserving allocators share: a sequence gets, on admission, all the memory it may ever use.

They differ in three things, and each is one file's: how much is promised (`_bound`), in units of what, and how the
units must lie (the arena).

    policy           promised          unit        units must be
    static           max_tokens        a row       -
    orca             an estimate       a block     a power of two, one after the other
    contiguous       an estimate       a token     one after the other
    paged_reserved   an estimate       a block     -
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from typing import Generic

from kvarena.allocators.actions import Action
from kvarena.allocators.arena import Arena, Place
from kvarena.allocators.forking import Forking
from kvarena.allocators.holding import Holding, Holdings, Units
from kvarena.allocators.kv_layout import KVLayout
from kvarena.allocators.memory.pending_copies import PendingCopies, row_copies
from kvarena.allocators.policy import Admission, IntegrityError, NotResidentError, Policy, Sequence
from kvarena.allocators.reservation.ledger import Extent, Leaves, Ledger
from kvarena.allocators.usage import Usage, extent_usage
from kvarena.errors import UserError


class ReservingPolicy(Policy, Generic[Place]):
    """Admission takes a run of units from an arena; growth only fills it; release gives it back."""

    sharing: Forking

    def __init__(
        self,
        kv_layout: KVLayout,
        pool_bytes: int,
        *,
        max_tokens: int,
        unit_tokens: int,
        bytes_of: Callable[[int], int],
        make_arena: Callable[[int], Arena[Place]],
    ) -> None:
        """`bytes_of(n)` is the bytes of n positions that lie together; `make_arena(n)` an arena of n units.

        Raises UserError for a pool that does not hold one unit.
        """
        self.kv_layout = kv_layout
        self.pool_bytes = pool_bytes
        self.max_tokens = max_tokens
        self._unit_tokens = unit_tokens
        self._unit_bytes = bytes_of(unit_tokens)
        num_units = pool_bytes // self._unit_bytes
        if num_units < 1:
            raise UserError(
                f"allocator {self.name}: a pool of {pool_bytes} bytes does not hold one unit of {unit_tokens} tokens, "
                f"which takes {self._unit_bytes} bytes"
            )
        self._remainder_bytes = pool_bytes % self._unit_bytes
        self._make_arena = make_arena
        self._arena = make_arena(num_units)
        self._places: dict[int, Place] = {}
        self._books = Ledger(bytes_of)
        self._pending = PendingCopies(self._copies)
        self._actions: list[Action] = []
        self.sharing = Forking(self, self._fork)

    @abstractmethod
    def _bound(self, seq: Sequence) -> int:
        """Tokens promised to a sequence."""

    def row(self, seq_id: int) -> int:
        """Index of a sequence's row. Where there are no rows but blocks, `_copies` and `_targets` say so."""
        raise UserError(f"allocator {self.name}: has no row(seq_id), which says where a sequence's row begins")

    def _copies(self, source_id: int, target_id: int, tokens: int) -> Iterable[Action]:
        """How the first `tokens` positions of one sequence come to lie in the memory of another."""
        return row_copies(self.kv_layout, self.row(source_id), self.row(target_id), tokens)

    def _units(self, tokens: int) -> int:
        """Units that cover so many tokens."""
        return -(-tokens // self._unit_tokens)

    def refusal(self, admission: Admission) -> str:
        """Each must fit its reservation, and all reservations an otherwise empty pool, beside those of the prefixes."""
        gang, kept = admission.gang, self.sharing.prefixes
        bound = self._bound(gang[0])
        fits = gang[0].final_tokens <= bound and self._units(bound) <= self._arena.max_units
        if fits and len(gang) + len(kept) > 1:
            fits = self._holds(self._make_arena(self._arena.num_units), [*kept.values(), *gang])
        return "" if fits else self._never_fits(admission)

    def can_admit(self, admission: Admission) -> bool:
        """Whether a reservation for each member can be placed now, all of them side by side."""
        gang = admission.gang
        units = self._units(self._bound(gang[0]))
        fits = admission.tokens <= units * self._unit_tokens and self._arena.fits(units)
        return fits and (len(gang) == 1 or self._holds(self._arena, gang))

    def admit(self, admission: Admission) -> int | None:
        """Reserve for the whole life of each member, and give it the first `tokens` positions."""
        return self.sharing.admit(admission, self._reserve) if self.can_admit(admission) else None

    def _reserve(self, seq: Sequence, tokens: int) -> bool:
        if seq.seq_id in self._places:
            raise ValueError(f"sequence {seq.seq_id} is resident already")
        bound = self._bound(seq)
        units = self._units(bound)
        if tokens > units * self._unit_tokens or not self._arena.fits(units):
            return False
        self._places[seq.seq_id] = self._arena.take(units)
        self._books.add(seq.seq_id, Extent(tokens, seq.final_tokens, bound, units * self._unit_tokens))
        return True

    def _holds(self, arena: Arena[Place], seqs: Seq[Sequence]) -> bool:
        """Whether all reservations can be placed: tried, and given back in reverse, which leaves no trace."""
        places: list[Place] = []
        for units in [self._units(self._bound(seq)) for seq in seqs]:
            if not arena.fits(units):
                break
            places.append(arena.take(units))
        for place in reversed(places):
            arena.give(place)
        return len(places) == len(seqs)

    def _fork(self, parent_id: int, child: Sequence) -> bool:
        """Reserve for the child's whole life; what the parent holds is copied. False where nothing can be placed."""
        if parent_id not in self._places:
            raise NotResidentError(parent_id)
        tokens = self._books.extents[parent_id].length
        if not self._reserve(child, tokens):
            return False
        self._pending.owe(parent_id, child.seq_id, tokens, self._actions)
        return True

    def tokens_until_growth(self, seq_id: int) -> int:
        """Tokens left in the reservation, which never gets another unit."""
        extent = self._books.extents[seq_id]
        return extent.capacity - extent.length

    def grow(self, seq_id: int, tokens: int = 1) -> bool:
        """Fill `tokens` more positions of the reservation."""
        self._pending.pay([seq_id], self._actions)
        return self._books.grow(seq_id, tokens)

    def release(self, seq_id: int) -> None:
        """Give the reservation back."""
        if seq_id not in self._places:
            raise NotResidentError(seq_id)
        self._pending.leave(seq_id, self._actions)
        self._actions = self._pending.without_copies_to(self._targets(seq_id), self._actions)
        self.sharing.prefixes.pop(seq_id, None)
        self._books.remove(seq_id)
        self._arena.give(self._places.pop(seq_id))

    def _targets(self, seq_id: int) -> Iterable[int]:
        """What copies into the sequence's memory name as their targets."""
        return (self.row(seq_id),)

    def length(self, seq_id: int) -> int:
        """Positions that the sequence has been given."""
        return self._books.extents[seq_id].length

    def holdings(self, seqs: Iterable[Sequence]) -> Holdings:
        """Units of the arena: a run of them for each sequence, or a list."""
        units = Units("unit", self._arena.num_units, float(self._unit_tokens))
        return Holdings(units, {seq.seq_id: self._holding(seq) for seq in seqs})

    def _holding(self, seq: Sequence) -> Holding:
        place, extent = self._places[seq.seq_id], self._books.extents[seq.seq_id]
        units = tuple(place) if isinstance(place, list) else tuple(range(place[0], place[0] + place[1]))
        leaves = extent_usage(extent.length, extent.final, extent.bound, extent.capacity, extent.capacity)
        return Holding(extent.length, units, tuple(leaf * self.kv_layout.token_bytes for leaf in leaves))

    def grow_each(self, seq_ids: Seq[int]) -> int:
        """One position for each; there is room to the end of all that were admitted."""
        self._pending.pay(seq_ids, self._actions)
        return super().grow_each(seq_ids) if self.kv_layout.has_windows else self._books.grow_each(seq_ids)

    def quiet_steps(self, seq_ids: Seq[int], limit: int, ahead: int = 0, margin: int = 1) -> int:
        """All of them: whoever was admitted has room to its end."""
        return 0 if self.kv_layout.has_windows or self._pending.active or self._actions else limit

    def advance(self, seq_ids: Seq[int], steps: int, head: Sequence | None = None) -> Usage:
        """Grow every sequence by `steps` tokens; the sum of `usage(head)` over these steps."""
        return self._usage(self._books.stretch(seq_ids, steps), steps, head)

    def drain(self) -> list[Action]:
        """Hand over the copies of prompts that members of a group are owed."""
        actions, self._actions = self._actions, []
        self._pending.handed_over()
        return actions

    def usage(self, head: Sequence | None = None) -> Usage:
        """Every byte in one leaf. Free units are stranded where they sum to the head's promise, and yet do not hold it:
        for lying apart, or for a power of two.
        """
        return self._usage(self._books.leaves(), 1, head)

    def _usage(self, leaves: Leaves, steps: int, head: Sequence | None) -> Usage:
        live, reserved, over_estimate, rounding = leaves
        unattached = self._arena.free_units * self._unit_bytes * steps
        stranded = unattached if head is not None and self._strands(head) else 0
        free = unattached - stranded
        return Usage(live, 0, reserved, over_estimate, rounding, 0, stranded, free, self._remainder_bytes * steps)

    def _strands(self, head: Sequence) -> bool:
        """Whether the head of the line is refused for shape alone."""
        bound = self._bound(head)
        enough = bound <= self._arena.free_units * self._unit_tokens
        return enough and not self._arena.fits(self._units(bound))

    def check_integrity(self) -> None:
        """Recount arena, places and leaves."""
        self._arena.check_integrity(self._places.values())
        self._books.check_integrity()
        if self._places.keys() != self._books.extents.keys():
            raise IntegrityError(f"places of {sorted(self._places)}, extents of {sorted(self._books.extents)}")
        if (usage := self.usage()).pool != self.pool_bytes:
            raise IntegrityError(f"leaves {usage.leaves} sum to {usage.pool}, the pool is {self.pool_bytes} bytes")
