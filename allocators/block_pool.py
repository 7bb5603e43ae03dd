"""Blocks that sequences may share: a free list and reference counts."""

from collections import Counter
from collections.abc import Iterable

from kvarena.allocators.free_list import FreeList
from kvarena.allocators.policy import IntegrityError


class BlockPool:
    """Blocks 0 .. num_blocks - 1, each free or held by one or more block tables."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = FreeList(num_blocks)
        # References beyond the first, of the blocks that have any. Most never do, and not counting to one makes an
        # allocation a slice of the free list: benchmarks/paged_policy.py shows what that gains.
        self._extra: dict[int, int] = {}

    @property
    def free_blocks(self) -> int:
        """Blocks that no table holds."""
        return self._free.free_units

    def take(self, count: int) -> list[int]:
        """Free blocks, now held once each. The caller has checked that there are as many."""
        return self._free.take(count)

    def share(self, blocks: list[int]) -> None:
        """Let one more table hold these blocks."""
        for block in blocks:
            self._extra[block] = self._extra.get(block, 0) + 1

    def is_shared(self, block: int) -> bool:
        """Whether several tables hold the block."""
        return block in self._extra

    def drop(self, blocks: list[int]) -> list[int]:
        """Let one table hold these blocks no more. Returns those that are free now."""
        if self._extra:
            blocks = [block for block in blocks if not self._drop_extra(block)]
        self._free.give(blocks)
        return blocks

    def _drop_extra(self, block: int) -> bool:
        """Give up a reference beyond the first; False where there is none."""
        extra = self._extra.get(block, 0)
        if extra > 1:
            self._extra[block] = extra - 1
        elif extra == 1:
            del self._extra[block]
        return extra > 0

    def check_integrity(self, tables: Iterable[list[int]]) -> None:
        """Recount references from the tables. Raises IntegrityError where they, or the free list, differ."""
        references = Counter(block for table in tables for block in table)
        self._free.check_integrity([list(references)])
        extra = {block: count - 1 for block, count in references.items() if count > 1}
        if extra != self._extra:
            raise IntegrityError(f"references beyond the first, by block: {self._extra} kept, {extra} recounted")
