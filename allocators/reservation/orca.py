"""Orca's allocator as the PagedAttention paper imitates it: an estimate of the length, reserved in one buddy chunk.

The paper did not run Orca; its artifact runs vLLM over this allocator. Section 6.1 names the three estimates. Memory is
lost twice: what the estimate exceeds (`over_estimate`), and what the power of two exceeds (`rounding`).
"""

from dataclasses import dataclass

from kvarena.allocators.arena import Chunk
from kvarena.allocators.kv_layout import KVLayout
from kvarena.allocators.limits import check_block_size
from kvarena.allocators.policy import Sequence
from kvarena.allocators.registry import allocator
from kvarena.allocators.reservation.buddy import BuddyAllocator, next_power_of_two
from kvarena.allocators.reservation.estimate import check_estimate, estimator
from kvarena.allocators.reservation.ledger import position_bytes
from kvarena.allocators.reservation.policy import ReservingPolicy
from kvarena.kernels.layout import Layout


@dataclass
class OrcaConfig:
    """Buddy chunks, reserved on admission."""

    name: str = "orca_oracle"
    estimate: str = "oracle"  # output that is reserved: max (max_tokens), pow2 (next power of two), oracle (true one)
    block_size: int = 16  # tokens of the smallest chunk

    def __post_init__(self) -> None:
        """Raises UserError for a guess that nobody makes, and a block size out of range."""
        check_estimate(self.estimate)
        check_block_size(self.block_size)


@allocator(OrcaConfig("orca_max", "max"), OrcaConfig("orca_pow2", "pow2"), OrcaConfig("orca_oracle", "oracle"))
class OrcaPolicy(ReservingPolicy[Chunk]):
    """Chunks of 1, 2, 4, ... blocks, up to one that holds `max_tokens`."""

    name = "orca"
    memory_layout = Layout.CONTIGUOUS

    def __init__(self, config: OrcaConfig, kv_layout: KVLayout, pool_bytes: int, max_tokens: int) -> None:
        self.name = f"orca_{config.estimate}"
        self._bound_of = estimator(config.estimate, max_tokens)
        max_blocks = next_power_of_two(-(-max_tokens // config.block_size))
        super().__init__(
            kv_layout,
            pool_bytes,
            max_tokens=max_tokens,
            unit_tokens=config.block_size,
            bytes_of=position_bytes(kv_layout),
            make_arena=lambda num_blocks: BuddyAllocator(num_blocks, max_blocks),
        )
        self.row_tokens = config.block_size  # tokens from one row to the next: rows overlap

    def _bound(self, seq: Sequence) -> int:
        return self._bound_of(seq)

    def _units(self, tokens: int) -> int:
        return next_power_of_two(super()._units(tokens))

    def row(self, seq_id: int) -> int:
        """First block of a sequence's chunk: its row is everything from there on."""
        return self._places[seq_id][0]
