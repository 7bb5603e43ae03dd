"""Static reservation: every sequence gets a row for the longest sequence there may be (FasterTransformer, Orca).

The pool is a matrix. A row costs `max_tokens` positions of every layer, written or not; layers with a sliding window
keep a ring of `window` positions instead.
"""

from dataclasses import dataclass

from kvarena.allocators.free_list import FreeList
from kvarena.allocators.kv_layout import KVLayout
from kvarena.allocators.policy import Sequence
from kvarena.allocators.registry import allocator
from kvarena.allocators.reservation.ledger import resident_bytes
from kvarena.allocators.reservation.policy import ReservingPolicy
from kvarena.kernels.layout import Layout


@dataclass
class StaticConfig:
    """One row of `max_tokens` per sequence: nothing to choose."""

    name: str = "static"


@allocator(StaticConfig())
class StaticPolicy(ReservingPolicy[list[int]]):
    """Rows of `max_tokens` positions, from a LIFO free list."""

    name = "static"
    memory_layout = Layout.CONTIGUOUS

    def __init__(self, config: StaticConfig, kv_layout: KVLayout, pool_bytes: int, max_tokens: int) -> None:
        super().__init__(
            kv_layout,
            pool_bytes,
            max_tokens=max_tokens,
            unit_tokens=max_tokens,
            bytes_of=resident_bytes(kv_layout),
            make_arena=FreeList,
        )
        self.row_tokens = max_tokens  # tokens from one row to the next

    def _bound(self, seq: Sequence) -> int:
        return self.max_tokens

    def row(self, seq_id: int) -> int:
        """Index of a sequence's row."""
        return self._places[seq_id][0]
