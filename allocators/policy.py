"""The contract of an allocation policy: who owns which slot, block or page-group. Pure bookkeeping, no bytes.

A policy is deterministic and imports no torch: the same object decides in a measured and in a modelled run. What has
to be done to real memory it says as *actions*, which a store performs (`store.py`) or a device model prices.
"""

from abc import ABC, abstractmethod
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


Action = Map | Unmap | CopyBlock


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

    def look_ahead(self) -> list[Action]:
        """Plan, after scheduling, what the next iteration will need: actions for the background."""
        return []

    def drain(self) -> list[Action]:
        """Hand over, once, the actions decided since the last call: they precede this step's forward pass."""
        return []
