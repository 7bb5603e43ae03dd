"""PagedAttention's allocator: a sequence gets a block when its last one is full (sections 4.2 to 4.5 of the paper).

Nothing is promised, so nothing is over-estimated; any block will do, so nothing is stranded. The price is that growth
may fail, and that kernels must follow block tables (`block_tables.py` draws them).

A block holds `block_size` tokens of every layer. Layers with a sliding window keep their old positions too: to free
them, they would need block tables of their own.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from kvarena.allocators.block_size import checked_block_size
from kvarena.allocators.block_tables import BlockTables
from kvarena.allocators.cpu_blocks import CpuBlocks
from kvarena.allocators.kv_layout import KVLayout
from kvarena.allocators.policy import Action, CopyBlock, IntegrityError, NotResidentError, Policy, Sequence
from kvarena.allocators.sizes import parse_bytes
from kvarena.allocators.stretch import longest_stretch
from kvarena.allocators.usage import Usage
from kvarena.errors import UserError
from kvarena.kernels.layout import Layout


@dataclass
class PagedConfig:
    """conf/allocator/paged.yaml."""

    name: str = "paged"
    block_size: int = 16  # tokens
    watermark: float = 0.01  # share of all blocks that an admission must leave free
    swap_bytes: int | str = 0  # CPU pool for preempted sequences

    def __post_init__(self) -> None:
        checked_block_size(self.block_size)


class PagedPolicy(Policy):
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
        self._tables = BlockTables(self.num_blocks, block_size)
        self._pool = self._tables.pool
        self._actions: list[Action] = []
        self.num_cpu_blocks = parse_bytes(swap_bytes, "allocator.swap_bytes") // block_bytes
        self._cpu_blocks = CpuBlocks(self.num_cpu_blocks, block_size)
        self._swapped = self._cpu_blocks.swapped

    @property
    def free_units(self) -> int:
        """Blocks that no sequence holds, the watermark's included."""
        return self._pool.free_units

    def blocks_for(self, tokens: int) -> int:
        """Blocks that so many tokens of one sequence take."""
        return self._tables.blocks_for(tokens)

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

    def block_table(self, seq_id: int) -> list[int]:
        """Blocks of a sequence, in the order of its positions. Not to be changed."""
        return self._tables.residents[seq_id].table

    def grow_each(self, seq_ids: Seq[int]) -> int:
        """One position for each, in order, as long as a block is free."""
        return super().grow_each(seq_ids) if self._tables.any_forked else self._tables.grow_each(seq_ids)

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
        return self._usage(self._tables.stretch(seq_ids, steps), steps)

    def usage(self, head: Sequence | None = None) -> Usage:
        """Every byte in one leaf."""
        return self._usage(self._tables.slots(), 1)

    def _usage(self, slots: tuple[int, int, int, int], steps: int) -> Usage:
        live, reserved, rounding, free = slots
        size = self._token_bytes
        return Usage(
            live * size, 0, reserved * size, 0, rounding * size, 0, 0, free * size, self._remainder_bytes * steps
        )

    # ---- groups ------------------------------------------------------------------------------------------------

    def group_fits_pool(self, seqs: Seq[Sequence]) -> bool:
        """As `fits_pool`: a free block for each member before its last token, or, to come back from the CPU pool, one
        beside its own and the watermark. Only the full blocks of the prompt are surely shared.
        """
        shared = min(seq.prompt_tokens for seq in seqs) // self.block_size
        needed = shared + sum(self.blocks_for(seq.final_tokens - 1) - shared + 1 for seq in seqs)
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
        if child.seq_id in self._swapped:
            raise ValueError(f"sequence {child.seq_id} is swapped out")
        self._tables.fork(parent_id, child.seq_id, child.final_tokens)
        return True

    @property
    def shared_bytes(self) -> int:
        """Blocks that sequences hold together, counted beyond the first time."""
        return self._pool.num_extra * self.block_size * self._token_bytes

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
