"""The CPU pool, as its books have it: blocks of the sequences that were swapped out (PagedAttention section 4.5).

A group goes and returns as a whole. A block that several of its members hold crosses once, and is shared on either
side. What a member shares with somebody outside the group crosses too, and comes back as the member's own.
"""

from collections.abc import Sequence as Seq

from kvarena.allocators.actions import Action, SwapIn, SwapOut
from kvarena.allocators.paged.block_pool import BlockPool
from kvarena.allocators.paged.block_tables import BlockTables, Resident
from kvarena.allocators.policy import IntegrityError
from kvarena.allocators.usage import extent_usage


class CpuBlocks:
    """Sequences that are swapped out, and the blocks of the CPU pool that hold them."""

    def __init__(self, num_blocks: int, tables: BlockTables, watermark_blocks: int, actions: list[Action]) -> None:
        """Sequences go from `tables`, and return there. Copies to be made are appended to `actions`."""
        self.num_blocks = num_blocks
        self.pool = BlockPool(num_blocks)
        self.block_size = tables.block_size
        self.swapped: dict[int, Resident] = {}  # tables of CPU blocks
        self._tables = tables
        self._watermark_blocks = watermark_blocks
        self._actions = actions

    def can_swap_out(self, seq_ids: Seq[int]) -> bool:
        """Whether there is a block for every distinct one of theirs."""
        return self.pool.fits(_distinct([self._tables.residents[seq_id] for seq_id in seq_ids]))

    def swap_out(self, seq_ids: Seq[int]) -> None:
        """Take in a gang. Blocks that it shares with others are copied for it alone."""
        copied: dict[int, int] = {}  # block -> CPU block
        for seq_id in seq_ids:
            resident = self._tables.residents[seq_id]
            known = [copied[block] for block in resident.table if block in copied]
            new = [block for block in resident.table if block not in copied]
            self.pool.share(known)
            copied.update(zip(new, self.pool.take(len(new)), strict=True))
            self.swapped[seq_id] = Resident(resident.final, resident.length, [copied[b] for b in resident.table])
        self._actions += [SwapOut(source, target) for source, target in copied.items()]
        for seq_id in seq_ids:
            self._tables.remove(seq_id)

    def can_swap_in(self, seq_ids: Seq[int]) -> bool:
        """Whether its blocks, and one for each member to grow into, are free beside the watermark (vLLM's artifact)."""
        needed = _distinct([self.swapped[seq_id] for seq_id in seq_ids]) + len(seq_ids)
        return needed + self._watermark_blocks <= self._tables.pool.free_units

    def swap_in(self, seq_ids: Seq[int]) -> None:
        """Give a gang back."""
        tables = self._tables
        copied: dict[int, int] = {}  # CPU block -> block
        by_last: dict[int, int] = {}  # last CPU block -> the sequence that came back with it
        for seq_id in seq_ids:
            away = self.swapped.pop(seq_id)
            last = away.table[-1]
            if last in by_last:
                tables.fork(by_last[last], seq_id, away.final)
            else:
                known = [copied[block] for block in away.table if block in copied]
                table = tables.add(seq_id, away.final, away.length, known)
                copied.update(zip(away.table, table, strict=True))
                by_last[last] = seq_id
            self.pool.drop(away.table)
        self._actions += [SwapIn(source, target) for source, target in copied.items()]

    def check_absent(self, seq_id: int) -> None:
        """Raises ValueError for a sequence that is here."""
        if seq_id in self.swapped:
            raise ValueError(f"sequence {seq_id} is swapped out")

    def forget(self, seq_id: int) -> None:
        """Drop a sequence that will not return."""
        self.pool.drop(self.swapped.pop(seq_id).table)

    def slots(self) -> tuple[int, int, int, int]:
        """Slots of this pool: live, reserved, past the end, free. Those of a shared block count once, as in the
        other pool: reserved if any of its sequences will write them.
        """
        marks: dict[int, tuple[int, int]] = {}  # block -> slots filled, slots filled or to be filled
        for away in self.swapped.values():
            for i, block in enumerate(away.table):
                start = i * self.block_size
                known = marks.get(block, (0, 0))
                marks[block] = (max(known[0], away.length - start), max(known[1], away.final - start))
        live = reserved = rounding = 0
        for length, final in marks.values():
            leaves = extent_usage(length, final, final, self.block_size, self.block_size)
            live, reserved, rounding = live + leaves[0], reserved + leaves[1], rounding + leaves[3]
        return live, reserved, rounding, self.pool.free_units * self.block_size

    def check_integrity(self) -> None:
        """Recount references, and slots. Raises IntegrityError where they differ."""
        self.pool.check_integrity(away.table for away in self.swapped.values())
        if sum(self.slots()) != self.num_blocks * self.block_size:
            raise IntegrityError(f"slots of {self.num_blocks} CPU blocks of {self.block_size}: {self.slots()}")


def _distinct(residents: Seq[Resident]) -> int:
    """Blocks that these hold, each counted once."""
    return len({block for resident in residents for block in resident.table})
