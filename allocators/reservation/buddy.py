"""The buddy allocator behind the Orca baselines (PagedAttention section 6.1, and its artifact).

Chunks are powers of two and lie at multiples of their size. A pool that is no power of two is carved greedily:

    984 blocks = | 128 | 128 | 128 | 128 | 128 | 128 | 128 | 64 | 16 | 8 |

A chunk is split by halves on its way out, and merges with its buddy (`start ^ size`) on its way back.
"""

from collections.abc import Iterable

from kvarena.allocators.arena import Chunk, check_tiling
from kvarena.allocators.policy import IntegrityError


def next_power_of_two(n: int) -> int:
    """Smallest power of two that is at least n, and at least 1."""
    return 1 << max(n - 1, 0).bit_length()


class BuddyAllocator:
    """An arena (`arena.py`) of chunks of 1, 2, 4, ... `max_chunk` units."""

    def __init__(self, num_units: int, max_chunk: int) -> None:
        self.num_units = num_units
        self.free_units = num_units
        self._max_chunk = next_power_of_two(max_chunk)
        # size -> starts of free chunks. Dicts keep their order: popitem() takes the chunk freed last, and a buddy
        # is found and removed without a search.
        self._free: dict[int, dict[int, None]] = {1 << i: {} for i in range(self._max_chunk.bit_length())}
        self._carve()
        self.max_units = max((size for size, starts in self._free.items() if starts), default=0)

    def _carve(self) -> None:
        start, size = 0, self._max_chunk
        while start < self.num_units:
            while size > self.num_units - start:
                size //= 2
            self._free[size][start] = None
            start += size

    def fits(self, units: int) -> bool:
        """Whether a free chunk is large enough."""
        return any(starts for size, starts in self._free.items() if size >= units)

    def take(self, units: int) -> Chunk:
        """A chunk of `units`, a power of two, cut from the smallest that is large enough."""
        size = units
        while not self._free[size]:
            size *= 2
        start, _ = self._free[size].popitem()
        while size > units:
            size //= 2
            self._free[size][start + size] = None
        self.free_units -= units
        return start, units

    def give(self, place: Chunk) -> None:
        """Give a chunk back; it merges with its buddy while that is free."""
        start, size = place
        self.free_units += size
        while size < self._max_chunk and (start ^ size) in self._free[size]:
            del self._free[size][start ^ size]
            start &= ~size
            size *= 2
        self._free[size][start] = None

    def free_chunks(self) -> list[Chunk]:
        """Every free chunk, ascending."""
        return sorted((start, size) for size, starts in self._free.items() for start in starts)

    def check_integrity(self, taken: Iterable[Chunk]) -> None:
        """Free and taken chunks tile the pool, each at a multiple of its size, and no two free ones are buddies."""
        free, taken = self.free_chunks(), list(taken)
        check_tiling(free, taken, self.num_units)
        if (free_units := sum(size for _, size in free)) != self.free_units:
            raise IntegrityError(f"free chunks sum to {free_units} units, {self.free_units} are booked")
        for start, size in (*free, *taken):
            if start % size:
                raise IntegrityError(f"a chunk of {size} units at {start}, which is no multiple of its size")
        for start, size in free:
            if size < self._max_chunk and (start ^ size) in self._free[size]:
                raise IntegrityError(f"free buddies of {size} units at {start} and {start ^ size} have not merged")
