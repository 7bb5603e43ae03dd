"""The contract of an allocation policy: who owns which slot, block or page-group. Pure bookkeeping, no bytes.

A policy is deterministic and imports no torch: the same object decides in a measured and in a modelled run. What has
to be done to real memory it says as *actions*, which a store performs (`store.py`) or a device model prices.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

from kvarena.allocators.kv_layout import KVLayout
from kvarena.allocators.usage import Usage
from kvarena.kernels.layout import Layout


@dataclass(slots=True, eq=False)
class Sequence:
    """A sequence as a policy sees it. `output_tokens` is the true output, known in a replay."""

    seq_id: int
    prompt_tokens: int
    output_tokens: int

    @property
    def final_tokens(self) -> int:
        """Length at its end: prompt + true output."""
        return self.prompt_tokens + self.output_tokens


class Map(NamedTuple):
    """Map page-group `slab` (one page-group in every tensor of layer group `group`) as the `ordinal`-th of `row`."""

    group: int
    row: int
    ordinal: int
    slab: int


class Unmap(NamedTuple):
    """Undo a `Map`; the slab is free again."""

    group: int
    row: int
    ordinal: int
    slab: int


class CopyBlock(NamedTuple):
    """Copy a block in every tensor (copy-on-write)."""

    source: int
    target: int


class SwapOut(NamedTuple):
    """Copy a block of every tensor to the CPU pool; `source` is free again."""

    source: int
    target: int  # a block of the CPU pool


class SwapIn(NamedTuple):
    """Copy a block of every tensor back; `source`, a block of the CPU pool, is free again."""

    source: int
    target: int


Action = Map | Unmap | CopyBlock | SwapOut | SwapIn


class IntegrityError(AssertionError):
    """A policy's books do not add up; the message shows the sum that fails. Always a bug of ours."""


class Policy(ABC):
    """Who owns which bytes of one pool.

    Running out is an answer (False), not an exception; a False leaves the policy as it was. A `seq_id` that is not
    resident, or is admitted twice, is a bug of the caller and raises KeyError or ValueError.
    """

    name: str
    memory_layout: Layout
    kv_layout: KVLayout
    pool_bytes: int

    @abstractmethod
    def fits_pool(self, seq: Sequence) -> bool:
        """Whether the sequence could ever run to its end, alone in an empty pool."""

    @abstractmethod
    def can_admit(self, seq: Sequence, tokens: int) -> bool:
        """Whether `admit` would succeed now."""

    @abstractmethod
    def admit(self, seq: Sequence, tokens: int) -> bool:
        """Give the sequence memory for its first `tokens` positions (a prompt, or one to be recomputed)."""

    @abstractmethod
    def can_grow(self, seq_id: int, tokens: int = 1) -> bool:
        """Whether `grow` would succeed now."""

    @abstractmethod
    def grow(self, seq_id: int, tokens: int = 1) -> bool:
        """Give the sequence memory for `tokens` more positions. Many at once are legal."""

    @abstractmethod
    def release(self, seq_id: int) -> None:
        """Take back all that the sequence owns."""

    @abstractmethod
    def length(self, seq_id: int) -> int:
        """Positions that the sequence has been given."""

    @abstractmethod
    def usage(self, head: Sequence | None = None) -> Usage:
        """Every byte of the pool in one leaf; `head` is the request that waits at the head of the line."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Recount everything from scratch. Raises IntegrityError with the sum that does not add up."""

    def tokens_until_growth(self, seq_id: int) -> int:
        """How many more positions fit into what the sequence owns already. 0 is always a safe answer."""
        return 0

    @property
    def free_units(self) -> int | None:
        """Units (blocks) that any sequence may still take; None where growth does not draw on such a count."""
        return None

    def grow_each(self, seq_ids: Seq[int]) -> int:
        """Give each of these sequences one more position, in this order, up to the first that finds no memory.

        Returns how many have got theirs. Where `free_units` counts units, a sequence is given nothing unless one is
        free, even if it needs none (vLLM's rule, PagedAttention's artifact).
        """
        for count, seq_id in enumerate(seq_ids):
            if self.free_units == 0 or not self.grow(seq_id):
                return count
        return len(seq_ids)

    def quiet_steps(self, seq_ids: Seq[int], limit: int) -> int:
        """How many decode steps in a row, `limit` at most, these sequences can surely take with nothing to decide.

        In each of them every sequence grows by one position and finds memory, at least one unit stays free where
        `free_units` counts them, and there is no action to perform. The answer may be too small, never too large.
        The caller's limit lets no sequence pass its final length (only rows of a padded batch may).
        """
        if self.kv_layout.has_windows:
            return 0  # leaves of a ring that fills up do not change evenly
        return min([limit, *map(self.tokens_until_growth, seq_ids)])

    def advance(self, seq_ids: Seq[int], steps: int, head: Sequence | None = None) -> Usage:
        """Grow every sequence by one position, `steps` times over; the sum of `usage(head)` over these steps.

        For quiet steps only. Here no sequence takes a new unit, so every leaf changes by the same amount each step.
        """
        before = self.usage(head)
        for seq_id in seq_ids:
            self.grow(seq_id, steps)
        after = self.usage(head)
        return Usage(*[steps * a + (b - a) * (steps + 1) // 2 for a, b in zip(before, after, strict=True)])

    @property
    def can_swap(self) -> bool:
        """Whether the policy has a CPU pool; without one the next four methods are not called."""
        return False

    def can_swap_out(self, seq_id: int) -> bool:
        """Whether the CPU pool has room for all that the sequence owns."""
        raise NotImplementedError(f"{self.name} has no CPU pool")

    def swap_out(self, seq_id: int) -> None:
        """Move the sequence to the CPU pool; it is resident no more. The copies come out of `drain`."""
        raise NotImplementedError(f"{self.name} has no CPU pool")

    def can_swap_in(self, seq_id: int) -> bool:
        """Whether the sequence fits back, one position more included, with the watermark left."""
        raise NotImplementedError(f"{self.name} has no CPU pool")

    def swap_in(self, seq_id: int) -> None:
        """Move the sequence back from the CPU pool. The copies come out of `drain`."""
        raise NotImplementedError(f"{self.name} has no CPU pool")

    def look_ahead(self) -> list[Action]:
        """Plan, after scheduling, what the next iteration will need: actions for the background."""
        return []

    def drain(self) -> list[Action]:
        """Hand over, once, the actions decided since the last call: they precede this step's forward pass."""
        return []
