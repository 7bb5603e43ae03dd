"""PagedAttention's allocator: a sequence gets a block when its last one is full (sections 4.2 to 4.5 of the paper).

Nothing is promised, so nothing is over-estimated; any block will do, so nothing is stranded. The price is that growth
may fail, and that kernels must follow block tables (`block_tables.py` draws them).

A block holds `block_size` tokens of every layer. Layers with a sliding window keep their old positions too: to free
them, they would need block tables of their own.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from operator import add

from kvarena.allocators.holding import Holding, Holdings, Units
from kvarena.allocators.kv_layout import KVLayout
from kvarena.allocators.limits import check_block_size, check_shares
from kvarena.allocators.paged.block_pool import BlockPool
from kvarena.allocators.paged.block_tables import BlockTables, Slots
from kvarena.allocators.paged.prefix_cache import BlockCache, CachedBlockPool
from kvarena.allocators.paged.sharing import SharedBlocks
from kvarena.allocators.paged.steps_until_growth import longest_stretch
from kvarena.allocators.paged.swapping import CpuBlocks
from kvarena.allocators.policy import (
    Action,
    Admission,
    CopyBlock,
    IntegrityError,
    NotResidentError,
    Policy,
    Sequence,
)
from kvarena.allocators.registry import allocator
from kvarena.allocators.sizes import parse_bytes
from kvarena.allocators.usage import Usage, extent_usage
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
        """Raises UserError for an option out of range."""
        check_block_size(self.block_size)
        check_shares(watermark=self.watermark)
        parse_bytes(self.swap_bytes, "allocator.swap_bytes")
        if isinstance(self.swap_bytes, str):
            self.swap_bytes = "".join(self.swap_bytes.split())  # as labels have it


@allocator(PagedConfig())
class PagedPolicy(Policy):
    """Blocks on demand, from one LIFO free list; copy-on-write; a CPU pool to swap to."""

    name = "paged"
    memory_layout = Layout.PAGED
    block_size: int
    sharing: SharedBlocks
    cache: BlockCache | None
    swapping: CpuBlocks | None

    def __init__(self, config: PagedConfig, kv_layout: KVLayout, pool_bytes: int, max_tokens: int) -> None:
        """Raises UserError for a pool smaller than a block."""
        self.kv_layout = kv_layout
        self.pool_bytes = pool_bytes
        self.max_tokens = max_tokens
        self.block_size = block_size = config.block_size
        self._token_bytes = kv_layout.token_bytes
        block_bytes = block_size * self._token_bytes
        self.num_blocks = pool_bytes // block_bytes
        if self.num_blocks < 1:
            raise UserError(
                f"allocator paged: a pool of {pool_bytes} bytes does not hold one block of {block_size} tokens, "
                f"which takes {block_bytes} bytes"
            )
        self._remainder_bytes = pool_bytes % block_bytes
        self.watermark_blocks = int(config.watermark * self.num_blocks)
        cached = CachedBlockPool(self.num_blocks) if config.prefix_cache else None
        self._pool = cached or BlockPool(self.num_blocks)
        self._tables = BlockTables(self._pool, block_size)
        self._actions: list[Action] = []  # one list for good: what swaps adds to it
        self.sharing = SharedBlocks(self, self._fork, self._tables)
        self.cache = BlockCache(cached, self._tables) if cached else None
        cpu_blocks = parse_bytes(config.swap_bytes) // block_bytes
        cpu_pool = CpuBlocks(cpu_blocks, self._tables, self.watermark_blocks, self._actions)
        self.swapping = cpu_pool if cpu_blocks else None

    @property
    def free_units(self) -> int:
        """Blocks that no sequence holds, the watermark's included."""
        return self._pool.free_units

    def block_table(self, seq_id: int) -> list[int]:
        """Blocks of a sequence, in the order of its positions. Not to be changed."""
        return self._tables.residents[seq_id].table

    def tokens_until_growth(self, seq_id: int) -> int:
        """Tokens that still fit in the last block; 0 where it is shared."""
        return self._tables.slack(seq_id)

    def refusal(self, admission: Admission) -> str:
        """It must be able to run alone whatever the scheduler asks: a free block for each member before its last token,
        or, to come back from the CPU pool, one beside its own and the watermark (section 4.5, and the artifact).

        Only the full blocks of the prompt are surely shared, and of the prefix; where there is a CPU pool not even
        these, since whoever was swapped out comes back with them as its own.
        """
        gang, size, blocks_for = admission.gang, self.block_size, self._tables.blocks_for
        final, shared = gang[0].final_tokens, gang[0].prompt_tokens // size
        needed = shared + len(gang) * (blocks_for(final - 1) - shared + 1)
        for prefix_id, prefix in self.sharing.prefixes.items():
            shares = prefix_id == admission.prefix and self.swapping is None
            needed += blocks_for(prefix.prompt_tokens) - (prefix.prompt_tokens // size if shares else 0)
        fits = final <= self.max_tokens and needed + self.watermark_blocks <= self.num_blocks
        return "" if fits else self._never_fits(admission)

    def can_admit(self, admission: Admission) -> bool:
        """Whether blocks for one member, whose prompt the others share, are free beside the watermark.

        A gang that comes back needs those of its members' own tokens too, and one for each to grow into, as when it is
        swapped in.
        """
        gang, tokens, own, prefix, names = admission
        needed = self._tables.blocks_for(tokens)
        if own:
            shared = tokens // self.block_size
            needed = shared + len(gang) * (self._tables.blocks_for(tokens + own) - shared + 1)
        if prefix is not None or names:
            needed -= self._blocks_there(admission)
        return needed + self.watermark_blocks <= self._pool.free_units

    def _blocks_there(self, admission: Admission) -> int:
        """Blocks that need not be taken: a prefix's full ones (its last one is copied, section 4.4), or found ones."""
        _, tokens, own, prefix, names = admission
        if prefix is not None:
            if (held := self._tables.resident(prefix).length) > tokens:
                raise ValueError(f"a prefix of {held} tokens in a prompt of {tokens}")
            return held // self.block_size
        if self.cache is None or own:
            return 0
        found = self.cache.find(names, tokens)
        return len(found) - self._pool.free_of(found)

    def admit(self, admission: Admission) -> int | None:
        """Give the first member blocks, those that are found among them, and let the others share them."""
        if not self.can_admit(admission):
            return None
        if self.cache is None or not admission.names:
            return self.sharing.admit(admission, self._add)
        found = self.cache.find(admission.names, admission.tokens)
        self.sharing.admit(admission, lambda seq, tokens: self._add(seq, tokens, found))
        self.cache.keep(admission.gang[0].seq_id, admission.names)  # written in this step
        return len(found) * self.block_size

    def _add(self, seq: Sequence, tokens: int, found: Seq[int] = ()) -> None:
        if self.swapping:
            self.swapping.check_absent(seq.seq_id)
        self._tables.add(seq.seq_id, seq.final_tokens, tokens, found)

    def _fork(self, parent_id: int, child: Sequence) -> bool:
        """Let the child share every block of its parent, so that this never runs out."""
        if self.swapping:
            self.swapping.check_absent(child.seq_id)
        self._tables.fork(parent_id, child.seq_id, child.final_tokens)
        return True

    def grow(self, seq_id: int, tokens: int = 1) -> bool:
        """Fill the last block, then take new ones. A shared last block is copied first."""
        if self._tables.blocks_to_grow(seq_id, tokens) > self._pool.free_units:
            return False
        if copy := self._tables.grow(seq_id, tokens):
            self._actions.append(copy)
        return True

    def release(self, seq_id: int) -> None:
        """Take back the sequence's blocks, or its place in the CPU pool."""
        if self.swapping and seq_id in self.swapping.swapped:
            self.swapping.forget(seq_id)
            return
        if seq_id not in self._tables.residents:
            raise NotResidentError(seq_id)
        self.sharing.prefixes.pop(seq_id, None)
        freed = self._tables.remove(seq_id)
        if self._actions:  # a copy that nobody will read
            self._actions[:] = [a for a in self._actions if not (isinstance(a, CopyBlock) and a.target in freed)]

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
        if len(seq_ids) * self._tables.blocks_for(limit) <= spare:
            return limit  # even if each took its first block at once
        if spare < 0:
            return 0
        return min(limit, longest_stretch(self._tables.slacks(seq_ids), spare, self.block_size))

    def advance(self, seq_ids: Seq[int], steps: int, head: Sequence | None = None) -> Usage:
        """Grow every sequence by `steps` tokens, new blocks included; the sum of `usage()` over these steps."""
        if self._tables.any_forked:
            return super().advance(seq_ids, steps, head)
        if self.cache is None:
            return self._usage(self._tables.stretch(seq_ids, steps), 0, steps)
        pool = self.cache.pool
        # Blocks without a name are taken first: until they are gone as many are cached as before, then all free ones.
        before = min(steps, longest_stretch(self._tables.slacks(seq_ids), pool.num_unnamed, self.block_size))
        cached = pool.num_cached * self.block_size * before
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
        if not self._actions:
            return []
        actions = self._actions.copy()
        self._actions.clear()
        return actions

    def holdings(self, seqs: Iterable[Sequence]) -> Holdings:
        """The blocks of their tables; those that they share too."""
        units = Units("block", self.num_blocks, float(self.block_size))
        return Holdings(units, {seq.seq_id: self._holding(seq) for seq in seqs})

    def _holding(self, seq: Sequence) -> Holding:
        table, length = self.block_table(seq.seq_id), self.length(seq.seq_id)
        capacity = len(table) * self.block_size
        leaves = extent_usage(length, seq.final_tokens, seq.final_tokens, capacity, capacity)
        return Holding(length, tuple(table), tuple(slots * self._token_bytes for slots in leaves))

    def check_integrity(self) -> None:
        """Recount tables, references, free lists and leaves."""
        self._tables.check_integrity()
        if self.swapping:
            self.swapping.check_integrity()
        if (usage := self.usage()).pool != self.pool_bytes or min(usage) < 0:
            raise IntegrityError(f"leaves {usage.leaves} sum to {usage.pool}, the pool is {self.pool_bytes} bytes")
