"""Groups, forks, prefixes and the prefix cache of paged memory, and its CPU pool.

Sharing is a matter of block tables (PagedAttention section 4.4): whoever shares holds the same blocks.
"""

from collections.abc import Hashable
from collections.abc import Sequence as Seq

from kvarena.allocators.actions import Action
from kvarena.allocators.holding import Holding, Units
from kvarena.allocators.paged.block_pool import BlockPool
from kvarena.allocators.paged.block_tables import BlockTables
from kvarena.allocators.paged.prefix_cache import CachedBlockPool
from kvarena.allocators.paged.swapping import CpuBlocks
from kvarena.allocators.policy import Policy, Sequence
from kvarena.allocators.usage import Usage, extent_usage


class BlockGroups(Policy):
    """What PagedPolicy does with several sequences at once."""

    max_tokens: int
    block_size: int
    num_blocks: int
    watermark_blocks: int
    num_cpu_blocks: int
    _token_bytes: int
    _tables: BlockTables
    _pool: BlockPool
    _cache: CachedBlockPool | None  # the pool, where it is one
    _cpu_blocks: CpuBlocks
    _actions: list[Action]

    def blocks_for(self, tokens: int) -> int:
        """Blocks that so many tokens of one sequence take."""
        return self._tables.blocks_for(tokens)

    def block_table(self, seq_id: int) -> list[int]:
        """Blocks of a sequence, in the order of its positions. Not to be changed."""
        return self._tables.residents[seq_id].table

    def group_fits_pool(self, seqs: Seq[Sequence], kept: Seq[Sequence] = (), prefix: int | None = None) -> bool:
        """As `fits_pool`: a free block for each member before its last token, or, to come back from the CPU pool, one
        beside its own and the watermark. Only the full blocks of the prompt are surely shared, and of the prefix; where
        there is a CPU pool not even these, since whoever was swapped out comes back with them as its own.
        """
        shared = min(seq.prompt_tokens for seq in seqs) // self.block_size
        needed = shared + sum(self.blocks_for(seq.final_tokens - 1) - shared + 1 for seq in seqs)
        for each in kept:
            shares = each.seq_id == prefix and not self.can_swap
            in_common = each.prompt_tokens // self.block_size if shares else 0
            needed += self.blocks_for(each.prompt_tokens) - in_common
        longest = max(seq.final_tokens for seq in seqs)
        return longest <= self.max_tokens and needed + self.watermark_blocks <= self.num_blocks

    def can_admit_group(self, seqs: Seq[Sequence], tokens: int, prefix: int | None = None) -> bool:
        """Whether blocks for one member are free beside the watermark: the others share them.

        A prefix's full blocks are shared too; its last one, where it is not full, is copied (section 4.4).
        """
        if prefix is None:
            return self.can_admit(seqs[0], tokens)
        prefix_tokens = self._tables.resident(prefix).length
        if prefix_tokens > tokens:
            raise ValueError(f"a prefix of {prefix_tokens} tokens in a prompt of {tokens}")
        held = prefix_tokens // self.block_size
        return self.blocks_for(tokens) - held + self.watermark_blocks <= self._pool.free_units

    def can_readmit_group(self, seqs: Seq[Sequence], tokens: int, own: int, prefix: int | None = None) -> bool:
        """Whether blocks are free beside the watermark for the prompt, shared where full, and for each member its own
        and one to grow into, as when it is swapped in.
        """
        shared = tokens // self.block_size
        apart = len(seqs) * (self.blocks_for(tokens + own) - shared + 1)
        held = 0 if prefix is None else self._tables.resident(prefix).length // self.block_size
        return shared + apart - held + self.watermark_blocks <= self._pool.free_units

    def fork(self, parent_id: int, child: Sequence) -> bool:
        """Make `child` a copy of a resident sequence. It shares every block, so that this never runs out."""
        if child.seq_id in self._cpu_blocks.swapped:
            raise ValueError(f"sequence {child.seq_id} is swapped out")
        self._tables.fork(parent_id, child.seq_id, child.final_tokens)
        return True

    @property
    def shared_bytes(self) -> int:
        """Blocks that sequences hold together, counted beyond the first time."""
        return self._pool.num_extra * self.block_size * self._token_bytes

    @property
    def units(self) -> Units:
        """Blocks."""
        return Units("block", self.num_blocks, float(self.block_size))

    def holding(self, seq: Sequence) -> Holding:
        """The blocks of its table; those that it shares too."""
        table, length = self.block_table(seq.seq_id), self.length(seq.seq_id)
        capacity = len(table) * self.block_size
        leaves = extent_usage(length, seq.final_tokens, seq.final_tokens, capacity, capacity)
        return Holding(length, tuple(table), tuple(slots * self._token_bytes for slots in leaves))

    # ---- the prefix cache --------------------------------------------------------------------------------------

    @property
    def cache_unit_tokens(self) -> int | None:
        """A block's tokens."""
        return self.block_size if self._cache else None

    def _found(self, names: Seq[Hashable], tokens: int) -> list[int]:
        """Blocks of the longest prefix that is in the cache; the last token must be fed, for its logits."""
        return self._cache.find(names[: (tokens - 1) // self.block_size]) if self._cache else []

    def cached_tokens(self, names: Seq[Hashable], tokens: int) -> int:
        """Leading tokens, at most all but one, that lie in blocks which can be found."""
        return len(self._found(names, tokens)) * self.block_size

    def can_admit_cached(self, seqs: Seq[Sequence], tokens: int, names: Seq[Hashable]) -> bool:
        """Whether blocks for what is not found are free beside the watermark, and beside what is."""
        found = self._found(names, tokens)
        taken = self.blocks_for(tokens) - len(found) + self._pool.free_of(found)
        return taken + self.watermark_blocks <= self._pool.free_units

    def admit_cached(self, seqs: Seq[Sequence], tokens: int, names: Seq[Hashable]) -> int | None:
        """Share the blocks that are found; the others can be found from now on, written in this step."""
        if not self.can_admit_cached(seqs, tokens, names):
            return None
        found = self._found(names, tokens)
        first, *others = seqs
        self._tables.add(first.seq_id, first.final_tokens, tokens, found)
        self.cache_blocks(first.seq_id, names)
        for seq in others:
            self.fork(first.seq_id, seq)
        return len(found) * self.block_size

    def cache_blocks(self, seq_id: int, names: Seq[Hashable]) -> None:
        """Let the sequence's full blocks be found, as far as there are names."""
        if self._cache:
            resident = self._tables.resident(seq_id)
            full = min(resident.length // self.block_size, len(names))
            self._cache.name(resident.table[:full], names[:full])

    # ---- swapping ----------------------------------------------------------------------------------------------

    @property
    def can_swap(self) -> bool:
        """Whether there is a CPU pool."""
        return self.num_cpu_blocks > 0

    def can_swap_out_group(self, seq_ids: Seq[int]) -> bool:
        """Whether the CPU pool has a block for each of the group's."""
        return self._cpu_blocks.fit(map(self.block_table, seq_ids))

    def swap_out_group(self, seq_ids: Seq[int]) -> None:
        """Move the group to the CPU pool. Blocks that it shares with others are copied for it alone."""
        self._actions += self._cpu_blocks.swap_out({seq_id: self._tables.residents[seq_id] for seq_id in seq_ids})
        for seq_id in seq_ids:
            self._tables.remove(seq_id)

    def can_swap_in_group(self, seq_ids: Seq[int]) -> bool:
        """Whether its blocks, and one for each member to grow into, are free beside the watermark (vLLM's artifact)."""
        needed = self._cpu_blocks.blocks_of(seq_ids) + len(seq_ids) + self.watermark_blocks
        return needed <= self._pool.free_units

    def swap_in_group(self, seq_ids: Seq[int]) -> None:
        """Move the group back from the CPU pool."""
        self._actions += self._cpu_blocks.swap_in(seq_ids, self._tables)

    def cpu_usage(self) -> Usage:
        """The second account: every byte of the CPU pool's blocks in one leaf."""
        live, reserved, rounding, free = (slots * self._token_bytes for slots in self._cpu_blocks.slots())
        return Usage(live=live, reserved=reserved, rounding=rounding, free=free)
