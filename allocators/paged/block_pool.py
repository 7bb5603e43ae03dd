"""Blocks that sequences may share: a free list and reference counts."""

from collections import Counter
from collections.abc import Iterable, Sequence

from kvarena.allocators.free_list import FreeList
from kvarena.allocators.policy import IntegrityError


class BlockPool(FreeList):
    """Blocks 0 .. num_units - 1, each free or held by one or more block tables.

    References are counted beyond the first only, so that a block which nobody shares needs no counter, and taking
    blocks is a slice of the free list. benchmarks/paged_policy.py shows what that gains.
    """

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self._extra: dict[int, int] = {}  # block -> references beyond the first, where there are any
        self.num_extra = 0  # their sum: blocks that sharing saves

    @property
    def num_cached(self) -> int:
        """Free blocks that can be found again by what they hold (`prefix_cache.py`)."""
        return 0

    def free_of(self, blocks: Iterable[int]) -> int:
        """How many of these blocks, found or held, nobody holds."""
        return 0

    def share(self, blocks: Sequence[int]) -> None:
        """Let one more table hold these blocks."""
        for block in blocks:
            self._extra[block] = self._extra.get(block, 0) + 1
        self.num_extra += len(blocks)

    def is_shared(self, block: int) -> bool:
        """Whether several tables hold the block."""
        return block in self._extra

    def drop(self, blocks: list[int]) -> list[int]:
        """Let one table hold these blocks no more. Returns those that are free now."""
        if self._extra:
            blocks = [block for block in blocks if not self._drop_extra(block)]
        self.give(blocks)
        return blocks

    def _drop_extra(self, block: int) -> bool:
        """Give up a reference beyond the first; False where there is none."""
        extra = self._extra.get(block, 0)
        if extra > 1:
            self._extra[block] = extra - 1
        elif extra == 1:
            del self._extra[block]
        self.num_extra -= extra > 0
        return extra > 0

    def check_integrity(self, taken: Iterable[list[int]]) -> None:
        """Recount references from the tables. Raises IntegrityError where they, or the free list, differ."""
        references = Counter(block for table in taken for block in table)
        super().check_integrity([list(references)])
        extra = {block: count - 1 for block, count in references.items() if count > 1}
        if extra != self._extra or sum(extra.values()) != self.num_extra:
            raise IntegrityError(f"references beyond the first, by block: {self._extra} kept, {extra} recounted")
