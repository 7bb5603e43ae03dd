"""The books of policies that give a sequence one extent of memory: how much of it is live, reserved, and so on.

Each extent has four marks along it (drawn in `usage.py`): length, final, bound, capacity. The ledger keeps the sum of
each mark over all extents, in bytes, so that the leaves are differences of four integers, whatever the batch. Growing
moves one mark of one extent: k tokens at once cost what one costs.
"""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from kvarena.allocators.kv_layout import KVLayout
from kvarena.allocators.policy import IntegrityError
from kvarena.allocators.usage import extent_usage

Leaves = tuple[int, int, int, int]  # live, reserved, over_estimate, rounding


@dataclass(slots=True, eq=False)
class Extent:
    """One sequence's extent; its marks in tokens from its start."""

    length: int
    final: int
    bound: int
    capacity: int


def position_bytes(kv_layout: KVLayout) -> Callable[[int], int]:
    """Bytes of n positions of all layers, whatever a window lets them forget."""
    token_bytes = kv_layout.token_bytes
    return lambda positions: positions * token_bytes


def resident_bytes(kv_layout: KVLayout) -> Callable[[int], int]:
    """Bytes of the K/V of a sequence as a function of its length; a window bends it."""
    if any(group.window is not None for group in kv_layout.groups):
        return kv_layout.resident_bytes
    return position_bytes(kv_layout)


class Ledger:
    """Extents by sequence id, and the sums of their marks."""

    def __init__(self, bytes_of: Callable[[int], int]) -> None:
        self.extents: dict[int, Extent] = {}
        self._bytes_of = bytes_of  # bytes of the first n positions of an extent
        self._live = self._final = self._bound = self._capacity = 0  # sums of marks, in bytes

    def add(self, seq_id: int, extent: Extent) -> None:
        """Book a sequence's extent. Raises ValueError where it has one."""
        if seq_id in self.extents:
            raise ValueError(f"sequence {seq_id} is resident already")
        self.extents[seq_id] = extent
        self._count(extent, 1)

    def remove(self, seq_id: int) -> None:
        """Strike out a sequence's extent."""
        self._count(self.extents.pop(seq_id), -1)

    def grow(self, seq_id: int, tokens: int) -> bool:
        """Move a sequence's length. False, and nothing happens, where it would pass the capacity."""
        extent = self.extents[seq_id]
        length = extent.length + tokens
        if length > extent.capacity:
            return False
        if length <= extent.final:
            self._live += self._bytes_of(length) - self._bytes_of(extent.length)
            extent.length = length
        else:  # it pushes the other marks along
            self._count(extent, -1)
            extent.length = length
            self._count(extent, 1)
        return True

    def grow_each(self, seq_ids: Seq[int]) -> int:
        """Move each length by one, up to the first at its capacity; returns how many. No layer has a window."""
        count = moved = 0  # moved: those below their final length, where no other mark moves
        for seq_id in seq_ids:
            extent = self.extents[seq_id]
            if extent.length < extent.final and extent.length < extent.capacity:
                extent.length += 1
                moved += 1
            elif not self.grow(seq_id, 1):
                break
            count += 1
        self._live += moved * self._bytes_of(1)
        return count

    def stretch(self, seq_ids: Seq[int], steps: int) -> Leaves:
        """Move these lengths by one, `steps` times over; the sum of `leaves()` over these steps.

        No length passes its final one, and a position costs the same wherever it is (no layer has a window).
        """
        for seq_id in seq_ids:
            self.extents[seq_id].length += steps
        live, reserved, over_estimate, rounding = self.leaves()
        grown = len(seq_ids) * self._bytes_of(1)  # in each step
        self._live += grown * steps
        moved = grown * steps * (steps + 1) // 2
        return steps * live + moved, steps * reserved - moved, steps * over_estimate, steps * rounding

    def widen(self, capacity: int) -> None:
        """Move the capacity of every extent, as a longer row joining a padded batch does."""
        for extent in self.extents.values():
            self._count(extent, -1)
            extent.capacity = capacity
            self._count(extent, 1)

    @property
    def capacity_bytes(self) -> int:
        """Bytes of all extents."""
        return self._capacity

    def leaves(self) -> Leaves:
        """Bytes of all extents as live, reserved, over_estimate, rounding."""
        live, final, bound = self._live, self._final, self._bound
        return live, final - live, bound - final, self._capacity - bound

    def _count(self, extent: Extent, sign: int) -> None:
        length, final, bound, capacity = self._marks(extent)
        bytes_of = self._bytes_of
        self._live += sign * bytes_of(length)
        self._final += sign * bytes_of(final)
        self._bound += sign * bytes_of(bound)
        self._capacity += sign * bytes_of(capacity)

    @staticmethod
    def _marks(extent: Extent) -> tuple[int, int, int, int]:
        """The four marks, none behind the one before it, none past the capacity."""
        capacity = extent.capacity
        final = max(extent.length, min(extent.final, capacity))
        return extent.length, final, max(final, min(extent.bound, capacity)), max(final, capacity)

    def check_integrity(self) -> None:
        """Recount the leaves from the extents. Raises IntegrityError where they differ from the sums kept."""
        recounted = [0, 0, 0, 0]
        for extent in self.extents.values():
            marks = (extent.length, extent.final, extent.bound, extent.capacity, extent.capacity)
            split = extent_usage(*map(self._bytes_of, marks))
            recounted = [total + part for total, part in zip(recounted, split, strict=False)]
        if tuple(recounted) != self.leaves():
            raise IntegrityError(
                f"live, reserved, over_estimate, rounding: {self.leaves()} kept, {recounted} recounted"
            )
