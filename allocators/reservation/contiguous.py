"""One contiguous chunk of exactly the estimated length, by best fit: Orca's allocator without its powers of two.

No paper has it. Beside Orca it shows what rounding costs; beside `paged_reserved`, what contiguity costs.
"""

from dataclasses import dataclass

from kvarena.allocators.arena import Chunk
from kvarena.allocators.kv_layout import KVLayout
from kvarena.allocators.policy import Sequence
from kvarena.allocators.registry import allocator
from kvarena.allocators.reservation.best_fit import BestFitAllocator
from kvarena.allocators.reservation.estimate import check_estimate, estimator
from kvarena.allocators.reservation.ledger import position_bytes
from kvarena.allocators.reservation.policy import ReservingPolicy
from kvarena.kernels.layout import Layout


@dataclass
class ContiguousConfig:
    """One chunk of exactly the estimated length."""

    name: str = "contiguous"
    estimate: str = "oracle"  # output that is reserved: max (max_tokens), pow2 (next power of two), oracle (true one)

    def __post_init__(self) -> None:
        """Raises UserError for a guess that nobody makes."""
        check_estimate(self.estimate)


@allocator(ContiguousConfig())
class ContiguousPolicy(ReservingPolicy[Chunk]):
    """Chunks of any number of tokens."""

    name = "contiguous"
    memory_layout = Layout.CONTIGUOUS

    def __init__(self, config: ContiguousConfig, kv_layout: KVLayout, pool_bytes: int, max_tokens: int) -> None:
        self._bound_of = estimator(config.estimate, max_tokens)
        super().__init__(
            kv_layout,
            pool_bytes,
            max_tokens=max_tokens,
            unit_tokens=1,
            bytes_of=position_bytes(kv_layout),
            make_arena=BestFitAllocator,
        )
        self.row_tokens = 1  # tokens from one row to the next: rows overlap

    def _bound(self, seq: Sequence) -> int:
        return self._bound_of(seq)

    def row(self, seq_id: int) -> int:
        """First token of a sequence's chunk: its row is everything from there on."""
        return self._places[seq_id][0]
