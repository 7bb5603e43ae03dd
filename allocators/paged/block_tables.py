"""Block tables: which block holds which positions of which sequence (PagedAttention sections 4.2 to 4.4).

    a sequence of 9 tokens, blocks of 4     block table 7, 1, 3

    block    0      1      2      3      4      5      6      7
           |    | |####| |    | |#...| |    | |    | |    | |####|

A sequence holds exactly the blocks that its length needs. Forks share them, and a last one that is not full is copied
before one of them writes to it: copy-on-write. A full block is never written again, so sharing it costs nothing more.

Slots are counted as they are filled, so that asking where all of them are costs the same whatever the batch.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

from kvarena.allocators.paged.block_pool import BlockPool
from kvarena.allocators.paged.steps_until_growth import growth
from kvarena.allocators.policy import Action, CopyBlock, IntegrityError, NotResidentError


@dataclass(slots=True, eq=False)
class Resident:
    """One sequence and its blocks."""

    final: int  # tokens at its end
    length: int
    table: list[int]
    rounding: int = 0  # slots of the last block past both length and final; 0 where others share it


class Slots(NamedTuple):
    """Every slot of the pool; or their sums over steps."""

    live: int  # filled, those of shared blocks once
    reserved: int  # empty, but to be written
    rounding: int  # empty and past the end
    free: int  # in free blocks


class BlockTables:
    """The tables of all resident sequences over one pool of blocks. Who may have how many is the policy's to say."""

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self.block_size = block_size
        self.pool = pool
        self.residents: dict[int, Resident] = {}
        self._sharers: dict[int, dict[int, Resident]] = {}  # partly filled block -> its holders, two or more
        self._live = 0  # slots filled, shared ones once
        self._rounding = 0  # sum over residents

    def blocks_for(self, tokens: int) -> int:
        """Blocks that so many tokens of one sequence take."""
        return -(-tokens // self.block_size)

    def blocks_to_grow(self, seq_id: int, tokens: int) -> int:
        """Blocks that `grow` would take, a copy of a shared last block included."""
        resident = self.residents[seq_id]
        copies = tokens > 0 and self._must_copy(resident)
        return self.blocks_for(resident.length + tokens) - len(resident.table) + copies

    def slack(self, seq_id: int) -> int:
        """Tokens that the sequence can write before it needs a block; none into a shared one."""
        resident = self.residents[seq_id]
        return 0 if self._must_copy(resident) else len(resident.table) * self.block_size - resident.length

    def slacks(self, seq_ids: Seq[int]) -> list[int]:
        """Tokens that each of these sequences can write before it needs a block. There are no forks."""
        residents, block_size = self.residents, self.block_size
        return [len(r.table) * block_size - r.length for r in [residents[seq_id] for seq_id in seq_ids]]

    def add(self, seq_id: int, final: int, tokens: int, shared: Seq[int] = ()) -> list[int]:
        """Give a new sequence its first blocks; returns them. The caller has checked that there are as many.

        The leading ones are `shared`, full blocks that others hold already, or that were found in the pool.
        """
        if seq_id in self.residents:
            raise ValueError(f"sequence {seq_id} is resident already")
        self._live += tokens
        if shared:
            self._live -= (len(shared) - self.pool.free_of(shared)) * self.block_size
            self.pool.share(shared)  # before others are taken: these must not be
        table = self.pool.take(self.blocks_for(tokens) - len(shared))
        if shared:
            table = [*shared, *table]
        resident = self.residents[seq_id] = Resident(final, tokens, table)
        self._round(resident)
        return table

    def grow(self, seq_id: int, tokens: int) -> CopyBlock | None:
        """Fill the last block, then take new ones. Returns the copy that must be made first, if any."""
        resident = self.residents[seq_id]
        copy = self._copy_last_block(seq_id, resident) if tokens > 0 and self._must_copy(resident) else None
        length = resident.length + tokens
        new = self.blocks_for(length) - len(resident.table)
        if new:
            resident.table += self.pool.take(new)
        resident.length = length
        self._live += tokens
        if tokens and (new or copy or length > resident.final):
            self._round(resident)
        return copy

    def grow_each(self, seq_ids: Seq[int], copies: list[Action]) -> int:
        """One token for each of these sequences, in order, as long as a block is free. Returns for how many.

        Copies that must be made first are appended to `copies`.
        """
        residents, sharers, block_size, free = self.residents, self._sharers, self.block_size, self.pool.free_units
        count = 0
        for seq_id in seq_ids:
            if not free:
                break
            resident = residents[seq_id]
            if sharers and resident.table and resident.table[-1] in sharers:
                copies.append(self._copy_last_block(seq_id, resident))
                self._round(resident)
                free -= 1
            length = resident.length = resident.length + 1
            if length > len(resident.table) * block_size:
                resident.table += self.pool.take(1)
                free -= 1
                self._round(resident)
            elif length > resident.final:
                self._round(resident)
            count += 1
        self._live += count
        return count

    def resident(self, seq_id: int) -> Resident:
        """A sequence by id. Raises NotResidentError where there is none."""
        if seq_id not in self.residents:
            raise NotResidentError(seq_id)
        return self.residents[seq_id]

    def fork(self, parent_id: int, child_id: int, final: int) -> None:
        """Give a new sequence all the blocks of another, to share."""
        if child_id in self.residents:
            raise ValueError(f"sequence {child_id} is resident already")
        parent = self.resident(parent_id)
        self.pool.share(parent.table)
        child = self.residents[child_id] = Resident(final, parent.length, parent.table.copy())
        if parent.length % self.block_size:
            self._rounding -= parent.rounding
            parent.rounding = 0
            self._sharers.setdefault(parent.table[-1], {parent_id: parent})[child_id] = child

    def remove(self, seq_id: int) -> list[int]:
        """Strike a sequence out; returns the blocks that are free now."""
        resident = self.residents.pop(seq_id)
        if self._must_copy(resident):
            self._share_no_more(seq_id, resident)
        self._rounding -= resident.rounding
        freed = self.pool.drop(resident.table)
        self._live -= len(freed) * self.block_size
        if freed and freed[-1] == resident.table[-1]:  # which need not be full
            self._live += len(resident.table) * self.block_size - resident.length
        return freed

    @property
    def any_forked(self) -> bool:
        """Whether any sequence must copy its last block before it writes."""
        return bool(self._sharers)

    def slots(self) -> Slots:
        """All slots of the pool; empty ones of a shared block are to be written if any of its holders reaches them."""
        rounding = self._rounding + (self._rounding_of_sharers() if self._sharers else 0)
        free = self.pool.free_units * self.block_size
        reserved = self.pool.num_units * self.block_size - free - self._live - rounding
        return Slots(self._live, reserved, rounding, free)

    def stretch(self, seq_ids: Seq[int], steps: int) -> Slots:
        """Grow every sequence by one token, `steps` times over; the sum of `slots()` over these steps.

        There are no forks, there are blocks enough, and nobody passes its final length.
        """
        block_size, residents, take = self.block_size, self.residents, self.pool.take
        held = (self.pool.num_units - self.pool.free_units) * steps  # blocks, summed over steps
        rounding = self._rounding * steps
        for seq_id in seq_ids:
            resident = residents[seq_id]
            table = resident.table
            length = resident.length = resident.length + steps
            missing = length - len(table) * block_size
            if missing > 0:
                new, new_held = growth(missing, block_size)
                held += new_held
                table += take(new)
                past = len(table) * block_size - resident.final
                if past > 0:  # only the block that holds the final position has slots past it: the last one taken
                    resident.rounding = past
                    self._rounding += past
                    rounding += past * (missing - (new - 1) * block_size)
        live = steps * self._live + len(seq_ids) * (steps * (steps + 1) // 2)
        self._live += len(seq_ids) * steps
        total = self.pool.num_units * block_size * steps
        return Slots(live, held * block_size - live - rounding, rounding, total - held * block_size)

    def _must_copy(self, resident: Resident) -> bool:
        """Whether the next token would be written into a block that others read."""
        return bool(self._sharers and resident.table) and resident.table[-1] in self._sharers

    def _copy_last_block(self, seq_id: int, resident: Resident) -> CopyBlock:
        self._share_no_more(seq_id, resident)
        source = resident.table[-1]
        [target] = self.pool.take(1)
        self.pool.drop([source])
        resident.table[-1] = target
        self._live += resident.length % self.block_size
        return CopyBlock(source, target)

    def _share_no_more(self, seq_id: int, resident: Resident) -> None:
        """Leave the holders of a partly filled block. The last of them has it to itself again."""
        holders = self._sharers[resident.table[-1]]
        del holders[seq_id]
        if len(holders) == 1:
            [last] = self._sharers.pop(resident.table[-1]).values()
            self._round(last)

    def _rounding_slots(self, resident: Resident) -> int:
        end = max(resident.final, resident.length)
        return max(0, len(resident.table) * self.block_size - end)

    def _round(self, resident: Resident) -> None:
        """Bring `rounding` up to date."""
        rounding = self._rounding_slots(resident)
        self._rounding += rounding - resident.rounding
        resident.rounding = rounding

    def _rounding_of_sharers(self) -> int:
        """Slots past the end of every holder of a shared block, each block once."""
        return sum(min(map(self._rounding_slots, holders.values())) for holders in self._sharers.values())

    def check_integrity(self) -> None:
        """Recount references, filled slots and rounding from the tables."""
        self.pool.check_integrity(resident.table for resident in self.residents.values())
        filled: dict[int, int] = {}  # block -> slots
        for seq_id, resident in self.residents.items():
            if len(resident.table) != self.blocks_for(resident.length):
                raise IntegrityError(f"sequence {seq_id}: {resident.length} tokens in {len(resident.table)} blocks")
            for i, block in enumerate(resident.table):
                slots = min(self.block_size, resident.length - i * self.block_size)
                if filled.setdefault(block, slots) != slots:
                    raise IntegrityError(
                        f"block {block} holds {filled[block]} tokens for one sequence, {slots} for another"
                    )
        if (live := sum(filled.values())) != self._live:
            raise IntegrityError(f"filled slots: {self._live} kept, {live} recounted")
        self._check_sharers()

    def _check_sharers(self) -> None:
        """Recount who shares a partly filled block, and the rounding of all others."""
        holders: dict[int, dict[int, Resident]] = {}
        rounding = 0
        for seq_id, resident in self.residents.items():
            if resident.length % self.block_size and self.pool.is_shared(resident.table[-1]):
                holders.setdefault(resident.table[-1], {})[seq_id] = resident
            else:
                rounding += self._rounding_slots(resident)
        if holders != self._sharers:
            raise IntegrityError(f"holders of partly filled blocks: {self._sharers} kept, {holders} recounted")
        if rounding != self._rounding:
            raise IntegrityError(f"slots past the end: {self._rounding} kept, {rounding} recounted")
