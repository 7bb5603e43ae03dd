"""A last-in-first-out list of free units that are all alike: blocks, or rows."""

from collections import Counter
from collections.abc import Iterable

from kvarena.allocators.policy import IntegrityError


class FreeList:
    """An arena (`arena.py`) whose runs are any units: the last ones given back are the first ones taken."""

    def __init__(self, num_units: int) -> None:
        self.num_units = self.max_units = num_units
        self._free = list(range(num_units - 1, -1, -1))  # a stack: its end is taken first

    @property
    def free_units(self) -> int:
        """Units given to nobody."""
        return len(self._free)

    def fits(self, units: int) -> bool:
        """Whether as many are free."""
        return units <= len(self._free)

    def take(self, units: int) -> list[int]:
        """Units in the order in which popping them one by one would yield them. The caller has checked `fits`."""
        free = self._free
        if units == 1:
            return [free.pop()]
        start = len(free) - units
        taken = free[start:]
        del free[start:]
        taken.reverse()
        return taken

    def give(self, place: list[int]) -> None:
        """Give units back, the last one first, so that taking as many again yields the same order."""
        self._free.extend(reversed(place))

    def check_integrity(self, taken: Iterable[list[int]]) -> None:
        """Every unit is either free or taken, once. Raises IntegrityError with those that are not."""
        count = Counter(self._free)
        for place in taken:
            count.update(place)
        if wrong := [unit for unit in range(self.num_units) if count[unit] != 1]:
            shown = ", ".join(f"unit {unit} {count[unit]} times" for unit in wrong[:8])
            raise IntegrityError(
                f"{len(self._free)} free + {count.total() - len(self._free)} taken of {self.num_units} units: {shown}"
            )
