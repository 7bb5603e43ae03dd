"""PagedAttention's allocator: a sequence gets a block when its last one is full (sections 4.2 to 4.4 of the paper).

    a sequence of 9 tokens, blocks of 4     block table 7, 1, 3

    block    0      1      2      3      4      5      6      7
           |    | |####| |    | |#...| |    | |    | |    | |####|

Sequences that share a prefix share its blocks; a shared last block is copied before it is written. A block holds
`block_size` tokens of every layer, so layers with a sliding window keep their old positions too.
"""

from collections import Counter
from dataclasses import dataclass

from kvarena.allocators.block_size import checked_block_size
from kvarena.allocators.free_list import FreeList
from kvarena.allocators.kv_layout import KVLayout
from kvarena.allocators.policy import Action, CopyBlock, IntegrityError, Policy, Sequence
from kvarena.allocators.usage import Usage
from kvarena.errors import UserError
from kvarena.kernels.layout import Layout


@dataclass
class PagedConfig:
    """conf/allocator/paged.yaml."""

    name: str = "paged"
    block_size: int = 16  # tokens
    watermark: float = 0.01  # share of all blocks that an admission must leave free


@dataclass(slots=True, eq=False)
class _Resident:
    final: int  # tokens at its end
    length: int
    table: list[int]  # exactly the blocks that `length` needs
    rounding: int = 0  # slots of the last block past both length and final; 0 in a family of forks


class PagedPolicy(Policy):
    """Block tables over one LIFO free list, with reference counts and copy-on-write."""

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
    ) -> None:
        """Raises UserError for a block size or watermark out of range, and a pool smaller than a block."""
        if not 0 <= watermark < 1:
            raise UserError(f"allocator.watermark: {watermark} is not in [0, 1)")
        self.kv_layout = kv_layout
        self.pool_bytes = pool_bytes
        self.max_tokens = max_tokens
        self.block_size = checked_block_size(block_size)
        self._token_bytes = kv_layout.token_bytes
        self.num_blocks = pool_bytes // (block_size * self._token_bytes)
        if self.num_blocks < 1:
            raise UserError(
                f"allocator paged: a pool of {pool_bytes} bytes does not hold one block of {block_size} tokens, "
                f"which takes {block_size * self._token_bytes} bytes"
            )
        self.watermark_blocks = int(watermark * self.num_blocks)
        self._blocks = FreeList(self.num_blocks)
        self._residents: dict[int, _Resident] = {}
        # References beyond the first, of the blocks that have any. Most never do, and not counting those makes an
        # allocation a slice of the free list (benchmarks/paged_policy.py).
        self._extra_references: dict[int, int] = {}
        self._forked: dict[int, _Resident] = {}  # residents that were forked, or are forks
        self._live = 0  # slots filled, shared ones once
        self._rounding = 0  # sum over residents
        self._actions: list[Action] = []

    @property
    def free_blocks(self) -> int:
        """Blocks given to nobody, the watermark's included."""
        return self._blocks.free_units

    def blocks_for(self, tokens: int) -> int:
        """Blocks that so many tokens of one sequence take."""
        return -(-tokens // self.block_size)

    def blocks_needed(self, seq_id: int, tokens: int = 1) -> int:
        """Blocks that `grow` would take from the free list, a copy of a shared last block included."""
        resident = self._residents[seq_id]
        return self.blocks_for(resident.length + tokens) - len(resident.table) + self._must_copy(resident)

    def tokens_until_growth(self, seq_id: int) -> int:
        """Tokens that still fit in the last block; 0 where it is shared."""
        resident = self._residents[seq_id]
        return 0 if self._must_copy(resident) else len(resident.table) * self.block_size - resident.length

    def fits_pool(self, seq: Sequence) -> bool:
        """Whether all its blocks fit beside the watermark, so that it may return after any preemption."""
        return (
            seq.final_tokens <= self.max_tokens
            and self.blocks_for(seq.final_tokens) + self.watermark_blocks <= self.num_blocks
        )

    def can_admit(self, seq: Sequence, tokens: int) -> bool:
        """Whether blocks for `tokens` are free beside the watermark."""
        return self.blocks_for(tokens) + self.watermark_blocks <= self._blocks.free_units

    def admit(self, seq: Sequence, tokens: int) -> bool:
        """Give the sequence blocks for its first `tokens` positions."""
        if seq.seq_id in self._residents:
            raise ValueError(f"sequence {seq.seq_id} is resident already")
        if not self.can_admit(seq, tokens):
            return False
        table = self._blocks.take(self.blocks_for(tokens))
        resident = self._residents[seq.seq_id] = _Resident(seq.final_tokens, tokens, table)
        self._live += tokens
        self._round(resident)
        return True

    def can_grow(self, seq_id: int, tokens: int = 1) -> bool:
        """Whether as many blocks are free as growth needs. Growth may use the watermark."""
        return self.blocks_needed(seq_id, tokens) <= self._blocks.free_units

    def grow(self, seq_id: int, tokens: int = 1) -> bool:
        """Fill the last block, then take new ones. A shared last block is copied first."""
        resident = self._residents[seq_id]
        length = resident.length + tokens
        new = -(-length // self.block_size) - len(resident.table)
        copy = self._must_copy(resident) if self._extra_references else False
        if new or copy:
            if new + copy > self._blocks.free_units:
                return False
            if copy:
                self._copy_last_block(resident)
            resident.table += self._blocks.take(new)
        resident.length = length
        self._live += tokens
        if (new or length > resident.final) and seq_id not in self._forked:
            self._round(resident)
        return True

    def fork(self, parent_id: int, child: Sequence) -> bool:
        """Make `child` a copy of a resident sequence. It shares every block, so that this never runs out."""
        if child.seq_id in self._residents:
            raise ValueError(f"sequence {child.seq_id} is resident already")
        parent = self._residents[parent_id]
        for block in parent.table:
            self._extra_references[block] = self._extra_references.get(block, 0) + 1
        self._rounding -= parent.rounding
        parent.rounding = 0
        twin = _Resident(child.final_tokens, parent.length, parent.table.copy())
        self._residents[child.seq_id] = twin
        self._forked[parent_id] = parent
        self._forked[child.seq_id] = twin
        return True

    def release(self, seq_id: int) -> None:
        """Drop the sequence's references; blocks without any are free again."""
        resident = self._residents.pop(seq_id)
        self._forked.pop(seq_id, None)
        self._rounding -= resident.rounding
        if not self._extra_references:
            self._live -= resident.length
            self._free(resident.table)
            return
        freed = [block for block in resident.table if not self._drop_extra_reference(block)]
        self._live -= len(freed) * self.block_size
        if freed and freed[-1] == resident.table[-1]:
            self._live += len(resident.table) * self.block_size - resident.length
        self._free(freed)

    def length(self, seq_id: int) -> int:
        """Positions that the sequence has been given."""
        return self._residents[seq_id].length

    def block_table(self, seq_id: int) -> list[int]:
        """Blocks of a sequence, in the order of its positions. Not to be changed."""
        return self._residents[seq_id].table

    def drain(self) -> list[Action]:
        """Hand over the copies decided since the last call."""
        actions, self._actions = self._actions, []
        return actions

    def usage(self, head: Sequence | None = None) -> Usage:
        """Every byte in one leaf. Nothing is promised, so nothing is over-estimated; no shape is asked, so nothing is
        stranded. The empty slots of a shared block are reserved where any of its sequences will write that far.
        """
        free_blocks = self._blocks.free_units
        attached = (self.num_blocks - free_blocks) * self.block_size  # slots
        rounding = self._rounding + (self._rounding_of_forks() if self._forked else 0)
        bytes_ = self._token_bytes
        return Usage(
            live=self._live * bytes_,
            reserved=(attached - self._live - rounding) * bytes_,
            rounding=rounding * bytes_,
            free=free_blocks * self.block_size * bytes_,
            remainder=self.pool_bytes - self.num_blocks * self.block_size * bytes_,
        )

    def _must_copy(self, resident: _Resident) -> bool:
        """Whether the next token would be written into a block that others read."""
        return resident.length % self.block_size != 0 and resident.table[-1] in self._extra_references

    def _copy_last_block(self, resident: _Resident) -> None:
        source = resident.table[-1]
        [target] = self._blocks.take(1)
        self._drop_extra_reference(source)
        resident.table[-1] = target
        self._live += resident.length % self.block_size
        self._actions.append(CopyBlock(source, target))

    def _drop_extra_reference(self, block: int) -> bool:
        """Give up one reference to a block; False where it was the only one."""
        extra = self._extra_references.get(block, 0)
        if extra > 1:
            self._extra_references[block] = extra - 1
        elif extra == 1:
            del self._extra_references[block]
        return extra > 0

    def _free(self, blocks: list[int]) -> None:
        if self._actions:  # a copy into a block that is given up would overwrite its next owner
            self._actions = [a for a in self._actions if not (isinstance(a, CopyBlock) and a.target in blocks)]
        self._blocks.give(blocks)

    def _rounding_slots(self, resident: _Resident) -> int:
        """Slots of its last block that lie past its length and its final length."""
        return max(0, len(resident.table) * self.block_size - max(resident.final, resident.length))

    def _round(self, resident: _Resident) -> None:
        """Bring `rounding` up to date."""
        rounding = self._rounding_slots(resident)
        self._rounding += rounding - resident.rounding
        resident.rounding = rounding

    def _rounding_of_forks(self) -> int:
        """Slots past the end of every sequence that holds the block, counted once."""
        slots: dict[int, int] = {}
        for resident in self._forked.values():
            if resident.table:
                rounding = self._rounding_slots(resident)
                slots[resident.table[-1]] = min(slots.get(resident.table[-1], rounding), rounding)
        return sum(slots.values())

    def check_integrity(self) -> None:
        """Recount references, the free list, filled slots and rounding from the block tables."""
        references: Counter[int] = Counter()
        filled: dict[int, int] = {}  # block -> slots
        for seq_id, resident in self._residents.items():
            if len(resident.table) != self.blocks_for(resident.length):
                raise IntegrityError(f"sequence {seq_id}: {resident.length} tokens in {len(resident.table)} blocks")
            references.update(resident.table)
            for i, block in enumerate(resident.table):
                slots = min(self.block_size, resident.length - i * self.block_size)
                if filled.setdefault(block, slots) != slots:
                    raise IntegrityError(
                        f"block {block} has {filled[block]} tokens of one sequence, {slots} of another"
                    )
        self._blocks.check_integrity([list(references)])
        extra = {block: count - 1 for block, count in references.items() if count > 1}
        if extra != self._extra_references:
            raise IntegrityError(f"references beyond the first: {self._extra_references} kept, {extra} recounted")
        if sum(filled.values()) != self._live:
            raise IntegrityError(f"filled slots: {self._live} kept, {sum(filled.values())} recounted")
        alone = [r for seq_id, r in self._residents.items() if seq_id not in self._forked]
        if (rounding := sum(map(self._rounding_slots, alone))) != self._rounding:
            raise IntegrityError(f"slots past the end: {self._rounding} kept, {rounding} recounted")
        if (usage := self.usage()).pool != self.pool_bytes or min(usage.leaves) < 0:
            raise IntegrityError(f"leaves {usage.leaves} sum to {usage.pool}, the pool is {self.pool_bytes} bytes")
