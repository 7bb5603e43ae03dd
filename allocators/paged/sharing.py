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

    @property
    def shared_bytes(self) -> int:
        """Blocks that sequences hold together, counted beyond the first time."""
        tables = self._tables
        return tables.pool.num_extra * tables.block_size * self._policy.kv_layout.token_bytes

    def grow_gang(self, seq_ids: Seq[int]) -> bool:
        """One position for each, where as many blocks are free as there are sequences (vLLM's rule)."""
        return len(seq_ids) <= self._tables.pool.free_units and self._policy.grow_each(seq_ids) == len(seq_ids)
