"""Blocks that need not lie together, but all reserved on admission: paging without growth.

No paper has it. Beside `contiguous` it shows what contiguity costs; beside `paged`, what reserving ahead costs.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from kvarena.allocators.actions import CopyBlock
from kvarena.allocators.free_list import FreeList
from kvarena.allocators.kv_layout import KVLayout
from kvarena.allocators.limits import check_block_size
from kvarena.allocators.policy import Sequence
from kvarena.allocators.registry import allocator
from kvarena.allocators.reservation.estimate import check_estimate, estimator
from kvarena.allocators.reservation.ledger import position_bytes
from kvarena.allocators.reservation.policy import ReservingPolicy
from kvarena.kernels.layout import Layout


@dataclass
class PagedReservedConfig:
    """Blocks, all of them reserved on admission."""

    name: str = "paged_reserved"
    estimate: str = "oracle"  # output that is reserved: max (max_tokens), pow2 (next power of two), oracle (true one)
    block_size: int = 16  # tokens of one block, 1 to 256

    def __post_init__(self) -> None:
        """Raises UserError for a guess that nobody makes, and a block size out of range."""
        check_estimate(self.estimate)
        check_block_size(self.block_size)


@allocator(PagedReservedConfig())
class PagedReservedPolicy(ReservingPolicy[list[int]]):
    """Any free blocks that cover the estimate."""

    name = "paged_reserved"
    memory_layout = Layout.PAGED
    block_size: int

    def __init__(self, config: PagedReservedConfig, kv_layout: KVLayout, pool_bytes: int, max_tokens: int) -> None:
        self.block_size = config.block_size
        self._bound_of = estimator(config.estimate, max_tokens)
        super().__init__(
            kv_layout,
            pool_bytes,
            max_tokens=max_tokens,
            unit_tokens=config.block_size,
            bytes_of=position_bytes(kv_layout),
            make_arena=FreeList,
        )
        self.num_blocks = self._arena.num_units

    def _bound(self, seq: Sequence) -> int:
        return self._bound_of(seq)

    def _copies(self, source_id: int, target_id: int, tokens: int) -> Iterable[CopyBlock]:
        used = -(-tokens // self.block_size)
        return map(CopyBlock, self._places[source_id][:used], self._places[target_id][:used])

    def _targets(self, seq_id: int) -> Iterable[int]:
        return self._places[seq_id]

    def block_table(self, seq_id: int) -> list[int]:
        """Blocks of a sequence, in the order of its positions. Not to be changed."""
        return self._places[seq_id]
