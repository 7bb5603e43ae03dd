"""Best fit with coalescing: a chunk of any size, cut from the tightest hole."""

from bisect import bisect_left, insort
from collections.abc import Iterable

from kvarena.allocators.arena import Chunk, check_tiling
from kvarena.allocators.policy import IntegrityError


class BestFitAllocator:
    """An arena (`arena.py`) of chunks of any size."""

    def __init__(self, num_units: int) -> None:
        self.num_units = self.max_units = num_units
        self.free_units = 0
        self._by_size: list[Chunk] = []  # holes as (size, start), ascending
        self._size_at: dict[int, int] = {}  # a hole's start -> its size
        self._start_of: dict[int, int] = {}  # a hole's end -> its start
        if num_units:
            self._add_hole(0, num_units)

    def fits(self, units: int) -> bool:
        """Whether one hole is large enough."""
        return bool(self._by_size) and self._by_size[-1][0] >= units

    def take(self, units: int) -> Chunk:
        """The low end of the tightest hole, the lowest of several. The caller has checked `fits`."""
        _, start = self._by_size[bisect_left(self._by_size, (units, 0))]
        size = self._remove_hole(start)
        if size > units:
            self._add_hole(start + units, size - units)
        return start, units

    def give(self, place: Chunk) -> None:
        """Give a chunk back; it coalesces with the holes on both sides."""
        start, end = place[0], sum(place)
        if end in self._size_at:
            end += self._remove_hole(end)
        if start in self._start_of:
            start -= self._remove_hole(self._start_of[start])
        self._add_hole(start, end - start)

    def _add_hole(self, start: int, size: int) -> None:
        insort(self._by_size, (size, start))
        self._size_at[start] = size
        self._start_of[start + size] = start
        self.free_units += size

    def _remove_hole(self, start: int) -> int:
        size = self._size_at.pop(start)
        del self._start_of[start + size]
        del self._by_size[bisect_left(self._by_size, (size, start))]
        self.free_units -= size
        return size

    def check_integrity(self, taken: Iterable[Chunk]) -> None:
        """Holes and taken chunks tile the pool, and no two holes touch."""
        check_tiling(self._size_at.items(), taken, self.num_units)
        if touching := [start for start in self._size_at if start in self._start_of]:
            raise IntegrityError(f"holes that touch have not coalesced, at {touching}")
        if (free_units := sum(size for size, _ in self._by_size)) != self.free_units:
            raise IntegrityError(f"holes sum to {free_units} units, {self.free_units} are booked")
