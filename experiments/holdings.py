"""What each running request holds: which units of the pool, in which order, and its bytes by leaf.

A unit is a block, a row of static memory, or a page-group in every tensor (a slab). All units of a pool are alike.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, NamedTuple

from kvarena.allocators.paged import PagedPolicy
from kvarena.allocators.policy import Action, Map, Policy, Sequence, Unmap
from kvarena.allocators.reservation import ReservingPolicy
from kvarena.allocators.usage import extent_usage
from kvarena.allocators.vattention import VAttentionPolicy
from kvarena.errors import UserError

OWNED = ("live", "reserved", "over_estimate", "rounding", "retained")  # leaves that belong to a request


class Holding(NamedTuple):
    """One request's memory: units in the order of its positions, and bytes by leaf as OWNED names them."""

    length: int  # tokens
    units: tuple[int, ...]
    leaves: tuple[int, ...]


class Holdings(ABC):
    """Reads a policy; one kind for each way to hold memory."""

    unit_name: str
    num_units: int
    unit_tokens: float  # that a unit holds

    @abstractmethod
    def holding(self, seq: Sequence) -> Holding:
        """What a running request holds now."""

    def follow(self, actions: Iterable[Action]) -> None:  # noqa: B027
        """Hear, once and in order, what was done to memory."""

    def idle_units(self, running: Iterable[int]) -> tuple[int, ...]:
        """Units that are kept ready and belong to nobody."""
        return ()


class Blocks(Holdings):
    """PagedAttention: a block table."""

    unit_name = "block"

    def __init__(self, policy: PagedPolicy) -> None:
        self._policy = policy
        self.num_units, self.unit_tokens = policy.num_blocks, float(policy.block_size)

    def holding(self, seq: Sequence) -> Holding:
        """The blocks of its table."""
        table, length = tuple(self._policy.block_table(seq.seq_id)), self._policy.length(seq.seq_id)
        capacity = len(table) * self._policy.block_size
        leaves = extent_usage(length, seq.final_tokens, seq.final_tokens, capacity, capacity)
        return Holding(length, table, _in_bytes(leaves, self._policy))


class Reservations(Holdings):
    """Static, Orca, contiguous: what was reserved on admission."""

    unit_name = "unit"

    def __init__(self, policy: ReservingPolicy[Any], unit_tokens: int) -> None:
        self._policy = policy
        self.unit_tokens = float(unit_tokens)
        self.num_units = policy.pool_bytes // (unit_tokens * policy.kv_layout.token_bytes)

    def holding(self, seq: Sequence) -> Holding:
        """A run of units, or a list of them."""
        place, extent = self._policy.place(seq.seq_id), self._policy.extent(seq.seq_id)
        units = tuple(place) if isinstance(place, list) else tuple(range(place[0], place[0] + place[1]))
        leaves = extent_usage(extent.length, extent.final, extent.bound, extent.capacity, extent.capacity)
        return Holding(extent.length, units, _in_bytes(leaves, self._policy))


class Rows(Holdings):
    """vAttention: what is mapped in its row, followed from the maps and unmaps."""

    unit_name = "page-group in every tensor"

    def __init__(self, policy: VAttentionPolicy) -> None:
        self._policy = policy
        [self._geometry] = policy.geometries
        self._slabs: dict[int, list[int]] = {}
        self.num_units = policy.num_slabs
        self.unit_tokens = self._geometry.page_group / self._geometry.token_stride

    def follow(self, actions: Iterable[Action]) -> None:
        """Rows grow and shrink at their ends."""
        for action in actions:
            if isinstance(action, Map):
                self._slabs.setdefault(action.row, []).append(action.slab)
            elif isinstance(action, Unmap):
                self._slabs[action.row].pop()

    def holding(self, seq: Sequence) -> Holding:
        """The slabs of its row."""
        g, length = self._geometry, self._policy.length(seq.seq_id)
        slabs = tuple(self._slabs.get(self._policy.row(seq.seq_id), ()))
        final, end = g.resident_bytes(seq.final_tokens), g.slabs_for(seq.final_tokens) * g.page_group
        leaves = extent_usage(g.resident_bytes(length), final, final, end, len(slabs) * g.page_group)
        return Holding(length, slabs, tuple(g.num_tensors * leaf for leaf in leaves))

    def idle_units(self, running: Iterable[int]) -> tuple[int, ...]:
        """Slabs mapped in rows without a request: deferred, or pre-mapped."""
        rows = {self._policy.row(seq_id) for seq_id in running}
        return tuple(slab for row, slabs in self._slabs.items() if row not in rows for slab in slabs)


def holdings_of(policy: Policy, allocator: Any) -> Holdings:
    """The reader that fits a policy. Raises UserError for one whose requests hold nothing of their own."""
    if isinstance(policy, PagedPolicy):
        return Blocks(policy)
    if isinstance(policy, VAttentionPolicy) and len(policy.geometries) == 1:
        return Rows(policy)
    if isinstance(policy, ReservingPolicy):
        return Reservations(policy, getattr(allocator, "block_size", 1))
    raise UserError(
        f"allocator {policy.name}: its memory cannot be told apart by request, so there is no picture of it"
    )


def _in_bytes(leaves: Iterable[int], policy: Policy) -> tuple[int, ...]:
    return tuple(leaf * policy.kv_layout.token_bytes for leaf in leaves)
