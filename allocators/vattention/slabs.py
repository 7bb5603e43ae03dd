"""Which slabs are free, and which nobody needs. A slab is one page-group in every tensor of a layer group.

Each slab knows how many rows own it, and how many of these are at rest: kept for what they hold, when their sequence
has gone (`kept_rows.py`). So what only the prefix cache holds is known without a search.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

from kvarena.allocators.policy import IntegrityError


class SlabList:
    """Slab ids, last in first out, in ascending runs where it can: neighbours in a row are one mapping, one call."""

    def __init__(self, num_slabs: int) -> None:
        self.num_slabs = num_slabs
        self._first_unused = 0  # slabs from here on were never taken
        self._returned: dict[int, None] = {}  # a set that remembers its order
        self._extra: dict[int, int] = {}  # slab -> rows that own it beyond the first, where there are any
        self._resting: dict[int, int] = {}  # slab -> rows at rest that own it, where there are any
        self.num_at_rest = 0  # slabs that only rows at rest own

    def __len__(self) -> int:
        return self.num_slabs - self._first_unused + len(self._returned)

    def take(self, after: int | None) -> int:
        """Take the slab that follows `after`, or else the one given back last, or else a new one."""
        follower = -1 if after is None else after + 1
        if follower in self._returned:
            del self._returned[follower]
            return follower
        all_used = self._first_unused == self.num_slabs
        if self._returned and (all_used or follower != self._first_unused):
            return self._returned.popitem()[0]
        if all_used:
            raise IntegrityError(f"a slab was taken when none of {self.num_slabs} was free")
        self._first_unused += 1
        return self._first_unused - 1

    def give(self, slab: int) -> None:
        """Give a slab back."""
        if slab in self._returned or not 0 <= slab < self._first_unused:
            raise IntegrityError(f"slab {slab} was given back, but is free")
        self._returned[slab] = None

    def share(self, slab: int) -> None:
        """Let one more row, which is not at rest, own a slab that somebody owns."""
        self.num_at_rest -= self.is_at_rest(slab)
        self._extra[slab] = self._extra.get(slab, 0) + 1

    def is_shared(self, slab: int) -> bool:
        """Whether several rows own it."""
        return slab in self._extra

    def unshare(self, slab: int) -> None:
        """Let one of several rows, which is not at rest, own it no more."""
        self._extra[slab] -= 1
        if not self._extra[slab]:
            del self._extra[slab]
        self.num_at_rest += self.is_at_rest(slab)

    def is_at_rest(self, slab: int) -> bool:
        """Whether only rows at rest own it."""
        return slab in self._resting and self._resting[slab] == 1 + self._extra.get(slab, 0)

    def rest(self, slabs: Iterable[int]) -> None:
        """Let one of the rows that own these go to rest."""
        for slab in slabs:
            self._resting[slab] = self._resting.get(slab, 0) + 1
            self.num_at_rest += self.is_at_rest(slab)

    def wake(self, slabs: Iterable[int]) -> None:
        """Let one of the rows at rest that own these be so no more."""
        for slab in slabs:
            self.num_at_rest -= self.is_at_rest(slab)
            self._resting[slab] -= 1
            if not self._resting[slab]:
                del self._resting[slab]

    def check_integrity(self, owned: Iterable[int], resting: Iterable[int] = ()) -> None:
        """Check that `owned` are all the slabs that are not free, each as often as it is counted.

        `resting` are those of rows at rest, each as often as there is such a row.
        """
        owners = Counter(owned)
        if sorted(owners) != sorted(self._taken()):
            raise IntegrityError(f"slabs in rows {sorted(owners)}, slabs not free {sorted(self._taken())}")
        extra = {slab: count - 1 for slab, count in owners.items() if count > 1}
        if extra != self._extra:
            raise IntegrityError(f"slabs in rows more than once: {self._extra} kept, {extra} recounted")
        at_rest = Counter(resting)
        if at_rest != self._resting:
            raise IntegrityError(f"slabs in rows at rest: {self._resting} kept, {dict(at_rest)} recounted")
        alone = sum(owners[slab] == count for slab, count in at_rest.items())
        if alone != self.num_at_rest:
            raise IntegrityError(f"slabs in rows at rest alone: {self.num_at_rest} kept, {alone} recounted")

    def _taken(self) -> Iterator[int]:
        return (slab for slab in range(self._first_unused) if slab not in self._returned)
