"""Sequences that share paged memory hold the same blocks in their block tables (PagedAttention section 4.4)."""

from collections.abc import Sequence as Seq

from kvarena.allocators.forking import Fork, Forking
from kvarena.allocators.paged.block_tables import BlockTables
from kvarena.allocators.policy import Policy


class SharedBlocks(Forking):
    """Gangs that hold blocks together."""

    def __init__(self, policy: Policy, fork: Fork, tables: BlockTables) -> None:
        super().__init__(policy, fork)
        self._tables = tables
        self._block_bytes = tables.block_size * policy.kv_layout.token_bytes

    @property
    def shared_bytes(self) -> int:
        """Blocks that sequences hold together, counted beyond the first time."""
        return self._tables.pool.num_extra * self._block_bytes

    def grow_gang(self, seq_ids: Seq[int]) -> bool:
        """One position for each, where as many blocks are free as there are sequences (vLLM's rule)."""
        return len(seq_ids) <= self._tables.pool.free_units and self._policy.grow_each(seq_ids) == len(seq_ids)
