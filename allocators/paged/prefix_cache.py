"""Blocks that can be found again by what they hold, as vLLM V1 has it: a prefix cache.

    prompt     | t0..t15 | t16..t31 | t32..  |        a block's name is a hash of its parent's name and its tokens,
    names      |   h0    |    h1    |                 so that equal names mean equal prefixes; only full blocks have one

A block that nobody holds keeps its name, and is found until its memory is needed. Then the least recently used goes
first, and of one sequence its last block before its first. Blocks without a name are taken before any that has one
(vLLM takes from one queue); of two blocks with one name only the first is found.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from collections.abc import Sequence as Seq

from kvarena.allocators.paged.block_pool import BlockPool
from kvarena.allocators.paged.block_tables import BlockTables
from kvarena.allocators.policy import IntegrityError


def block_names(token_ids: Seq[int], block_size: int, salt: str = "") -> list[bytes]:
    """Names of the full blocks of a sequence. Sequences with different salts share nothing."""
    parent = hashlib.sha256(salt.encode()).digest()
    names = []
    for end in range(block_size, len(token_ids) + 1, block_size):
        tokens = array("q", token_ids[end - block_size : end]).tobytes()
        parent = hashlib.sha256(parent + tokens).digest()
        names.append(parent)
    return names


class CachedBlockPool(BlockPool):
    """A block pool whose free blocks may have names."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self._name_of: dict[int, Hashable] = {}  # blocks held, or cached
        self._block_of: dict[Hashable, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # free blocks with a name, the next to go first

    @property
    def num_cached(self) -> int:
        """Free blocks that can be found."""
        return len(self._cached)

    @property
    def num_unnamed(self) -> int:
        """Free blocks that cannot be found."""
        return len(self._free)

    @property
    def free_units(self) -> int:
        """Blocks that nobody holds, those that can be found included."""
        return len(self._free) + len(self._cached)

    def fits(self, units: int) -> bool:
        """Whether as many are free."""
        return units <= self.free_units

    def find(self, names: Seq[Hashable]) -> list[int]:
        """The longest leading run of these names that there are blocks for."""
        blocks = []
        for block in map(self._block_of.get, names):
            if block is None:
                break
            blocks.append(block)
        return blocks

    def name(self, blocks: Seq[int], names: Seq[Hashable]) -> None:
        """Let blocks that somebody holds, and that are full, be found from now on."""
        for block, name in zip(blocks, names, strict=True):
            if name not in self._block_of and block not in self._name_of:
                self._block_of[name] = block
                self._name_of[block] = name

    def free_of(self, blocks: Iterable[int]) -> int:
        """How many of these blocks nobody holds."""
        return sum(block in self._cached for block in blocks)

    def share(self, blocks: Seq[int]) -> None:
        """Let one more table hold these blocks; for those that nobody held it is the first."""
        held = []
        for block in blocks:
            if block in self._cached:
                del self._cached[block]
            else:
                held.append(block)
        super().share(held)

    def take(self, units: int) -> list[int]:
        """Blocks, without a name as long as there are such."""
        while len(self._free) < units:
            block, _ = self._cached.popitem(last=False)
            del self._block_of[self._name_of.pop(block)]
            self._free.append(block)
        return super().take(units)

    def give(self, place: list[int]) -> None:
        """Give blocks back, the last one first; those that have a name can still be found."""
        for block in reversed(place):
            if block in self._name_of:
                self._cached[block] = None
            else:
                self._free.append(block)

    def check_integrity(self, taken: Iterable[list[int]]) -> None:
        """As of every block pool; and names and blocks belong together one to one."""
        super().check_integrity([*taken, list(self._cached)])
        if {name: block for block, name in self._name_of.items()} != self._block_of:
            raise IntegrityError(f"names of blocks: {self._name_of}, blocks of names: {self._block_of}")
        if unnamed := [block for block in self._cached if block not in self._name_of]:
            raise IntegrityError(f"cached blocks without a name: {unnamed}")


class BlockCache:
    """What of a prompt is found in the pool, in full blocks."""

    def __init__(self, pool: CachedBlockPool, tables: BlockTables) -> None:
        self.pool = pool
        self.unit_tokens = tables.block_size
        self._tables = tables

    def find(self, names: Seq[Hashable], tokens: int) -> list[int]:
        """Blocks of the longest prefix that is in the pool; the last token must be fed, for its logits."""
        return self.pool.find(names[: (tokens - 1) // self.unit_tokens])

    def found_tokens(self, names: Seq[Hashable], tokens: int) -> int:
        """Leading tokens, at most all but one, that lie in blocks which can be found."""
        return len(self.find(names, tokens)) * self.unit_tokens

    def keep(self, seq_id: int, names: Seq[Hashable]) -> None:
        """Let the sequence's full blocks be found, as far as there are names."""
        resident = self._tables.resident(seq_id)
        full = min(resident.length // self.unit_tokens, len(names))
        self.pool.name(resident.table[:full], names[:full])
