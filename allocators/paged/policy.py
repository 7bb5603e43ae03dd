"""PagedAttention's allocator: a sequence gets a block when its last one is full (sections 4.2 to 4.5 of the paper).

Nothing is promised, so nothing is over-estimated; any block will do, so nothing is stranded. The price is that growth
may fail, and that kernels must follow block tables (`block_tables.py` draws them).

A block holds `block_size` tokens of every layer. Layers with a sliding window keep their old positions too: to free
them, they would need block tables of their own.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from operator import add

from kvarena.allocators.block_size import checked_block_size
from kvarena.allocators.kv_layout import KVLayout
from kvarena.allocators.paged.block_pool import BlockPool
from kvarena.allocators.paged.block_tables import BlockTables, Slots
from kvarena.allocators.paged.groups import BlockGroups
from kvarena.allocators.paged.prefix_cache import CachedBlockPool
from kvarena.allocators.paged.steps_until_growth import longest_stretch
from kvarena.allocators.paged.swapping import CpuBlocks
from kvarena.allocators.policy import Action, CopyBlock, IntegrityError, NotResidentError, Sequence
from kvarena.allocators.registry import allocator
from kvarena.allocators.sizes import parse_bytes
from kvarena.allocators.usage import Usage
from kvarena.errors import UserError
from kvarena.kernels.layout import Layout


@dataclass
class PagedConfig:
    """Blocks on demand, block tables, copy-on-write."""

    name: str = "paged"
    block_size: int = 16  # tokens of one block, 1 to 256
    watermark: float = 0.01  # share of all blocks that an admission must leave free
    swap_bytes: int | str = 0  # CPU pool for preempted sequences, such as 20GB; 0: none, every victim is recomputed
    prefix_cache: bool = False  # find full blocks again by what they hold (docs/design.md)

    def __post_init__(self) -> None:
        checked_block_size(self.block_size)


@allocator(PagedConfig())
class PagedPolicy(BlockGroups):
    """Blocks on demand, from one LIFO free list; copy-on-write; a CPU pool to swap to."""

    name = "paged"
    memory_layout = Layout.PAGED

    def __init__(
        self,
        kv_layout: KVLayout,
        pool_bytes: int,
        *,
        max_tokens: int,
        block_size: int = 16,
        watermark: float = 0.01,
        swap_bytes: int | str = 0,
        prefix_cache: bool = False,
    ) -> None:
        """Raises UserError for a block size or watermark out of range, and for a pool smaller than a block."""
        if not 0 <= watermark < 1:
            raise UserError(f"allocator.watermark: {watermark} is not in [0, 1)")
        self.kv_layout = kv_layout
        self.pool_bytes = pool_bytes
        self.max_tokens = max_tokens
        self.block_size = checked_block_size(block_size)
        self._token_bytes = kv_layout.token_bytes
        block_bytes = block_size * self._token_bytes
        self.num_blocks = pool_bytes // block_bytes
        if self.num_blocks < 1:
            raise UserError(
                f"allocator paged: a pool of {pool_bytes} bytes does not hold one block of {block_size} tokens, "
                f"which takes {block_bytes} bytes"
            )
        self._remainder_bytes = pool_bytes % block_bytes
        self.watermark_blocks = int(watermark * self.num_blocks)
        self._cache = CachedBlockPool(self.num_blocks) if prefix_cache else None
        self._pool = self._cache or BlockPool(self.num_blocks)
        self._tables = BlockTables(self._pool, block_size)
        self._actions: list[Action] = []
        self.num_cpu_blocks = parse_bytes(swap_bytes, "allocator.swap_bytes") // block_bytes
        self._cpu_blocks = CpuBlocks(self.num_cpu_blocks, block_size)
        self._swapped = self._cpu_blocks.swapped

    @property
    def free_units(self) -> int:
        """Blocks that no sequence holds, the watermark's included."""
        return self._pool.free_units

    def blocks_needed(self, seq_id: int, tokens: int = 1) -> int:
        """Blocks that `grow` would take, a copy of a shared last block included."""
        return self._tables.blocks_to_grow(seq_id, tokens)

    def tokens_until_growth(self, seq_id: int) -> int:
        """Tokens that still fit in the last block; 0 where it is shared."""
        return self._tables.slack(seq_id)

    def fits_pool(self, seq: Sequence) -> bool:
        """Whether it can run alone whatever the scheduler asks: a free block before its last token, or, to come back
        from the CPU pool, one beside its own and the watermark (section 4.5, and the rules of the artifact).
        """
        needed = self.blocks_for(seq.final_tokens - 1) + 1 + self.watermark_blocks
        return seq.final_tokens <= self.max_tokens and needed <= self.num_blocks

    def can_admit(self, seq: Sequence, tokens: int) -> bool:
        """Whether blocks for `tokens` are free beside the watermark."""
        return self.blocks_for(tokens) + self.watermark_blocks <= self._pool.free_units

    def admit(self, seq: Sequence, tokens: int) -> bool:
        """Give the sequence blocks for its first `tokens` positions."""
        if seq.seq_id in self._swapped:
            raise ValueError(f"sequence {seq.seq_id} is swapped out")
        if not self.can_admit(seq, tokens):
            return False
        self._tables.add(seq.seq_id, seq.final_tokens, tokens)
        return True

    def can_grow(self, seq_id: int, tokens: int = 1) -> bool:
        """Whether as many blocks are free as growth needs. Growth may use the watermark."""
        return self.blocks_needed(seq_id, tokens) <= self._pool.free_units

    def grow(self, seq_id: int, tokens: int = 1) -> bool:
        """Fill the last block, then take new ones. A shared last block is copied first."""
        if self._tables.blocks_to_grow(seq_id, tokens) > self._pool.free_units:
            return False
        if copy := self._tables.grow(seq_id, tokens):
            self._actions.append(copy)
        return True

    def release(self, seq_id: int) -> None:
        """Take back the sequence's blocks, or its place in the CPU pool."""
        if seq_id in self._swapped:
            self._cpu_blocks.forget(seq_id)
            return
        if seq_id not in self._tables.residents:
            raise NotResidentError(seq_id)
        freed = self._tables.remove(seq_id)
        if self._actions:  # a copy that nobody will read
            self._actions = [a for a in self._actions if not (isinstance(a, CopyBlock) and a.target in freed)]

    def length(self, seq_id: int) -> int:
        """Positions that the sequence has been given."""
        return self._tables.residents[seq_id].length

    def grow_each(self, seq_ids: Seq[int]) -> int:
        """One position for each, in order, as long as a block is free."""
        return self._tables.grow_each(seq_ids, self._actions)

    def quiet_steps(self, seq_ids: Seq[int], limit: int, ahead: int = 0, margin: int = 1) -> int:
        """Steps, `limit` at most, that leave as many blocks free as vLLM asks for before an append."""
        spare = self._pool.free_units - margin
        if self._tables.any_forked:
            return super().quiet_steps(seq_ids, limit) if spare >= 0 else 0
        if len(seq_ids) * self.blocks_for(limit) <= spare:
            return limit  # even if each took its first block at once
        if spare < 0:
            return 0
        return min(limit, longest_stretch(self._tables.slacks(seq_ids), spare, self.block_size))

    def advance(self, seq_ids: Seq[int], steps: int, head: Sequence | None = None) -> Usage:
        """Grow every sequence by `steps` tokens, new blocks included; the sum of `usage()` over these steps."""
        if self._tables.any_forked:
            return super().advance(seq_ids, steps, head)
        if self._cache is None:
            return self._usage(self._tables.stretch(seq_ids, steps), 0, steps)
        # Blocks without a name are taken first: until they are gone as many are cached as before, then all free ones.
        before = min(steps, longest_stretch(self._tables.slacks(seq_ids), self._cache.num_unnamed, self.block_size))
        cached = self._cache.num_cached * self.block_size * before
        slots = self._tables.stretch(seq_ids, before)
        if before < steps:
            after = self._tables.stretch(seq_ids, steps - before)
            cached += after.free
            slots = Slots(*map(add, slots, after))
        return self._usage(slots, cached, steps)

    def usage(self, head: Sequence | None = None) -> Usage:
        """Every byte in one leaf."""
        return self._usage(self._tables.slots(), self._pool.num_cached * self.block_size, 1)

    def _usage(self, slots: Slots, cached: int, steps: int) -> Usage:
        """Leaves from slots, those of cached blocks among the free ones; both summed over steps."""
        size = self._token_bytes
        live, reserved, rounding, free = (count * size for count in slots)
        kept = cached * size
        return Usage(live, kept, reserved, 0, rounding, 0, 0, free - kept, self._remainder_bytes * steps)

    def drain(self) -> list[Action]:
        """Hand over the copies decided since the last call; they are to be made in this order."""
        actions, self._actions = self._actions, []
        return actions

    def check_integrity(self) -> None:
        """Recount tables, references, free lists and leaves."""
        self._tables.check_integrity()
        self._cpu_blocks.check_integrity()
        if (usage := self.usage()).pool != self.pool_bytes or min(usage) < 0:
            raise IntegrityError(f"leaves {usage.leaves} sum to {usage.pool}, the pool is {self.pool_bytes} bytes")
