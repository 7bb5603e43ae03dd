"""The contract of an arena: equal units, given out in runs. What it demands of a run's shape is what can strand memory.

FreeList           any units, in any order         never strands
BuddyAllocator     a power of two, at a multiple   strands
BestFitAllocator   one after the other             strands
"""

from collections.abc import Iterable
from typing import Protocol, TypeVar

from kvarena.allocators.policy import IntegrityError

Chunk = tuple[int, int]  # a run of units that lie one after the other: start, size

Place = TypeVar("Place", bound=list[int] | Chunk)


class Arena(Protocol[Place]):
    """Units 0 .. num_units - 1. `Place` says which units make up a run: a list of them, or a Chunk."""

    num_units: int
    max_units: int  # the longest run it could give out when empty

    @property
    def free_units(self) -> int:
        """Units given to nobody."""

    def fits(self, units: int) -> bool:
        """Whether `take` would succeed now."""

    def take(self, units: int) -> Place:
        """A run of `units`. The caller has checked `fits`."""

    def give(self, place: Place) -> None:
        """Give a run back."""

    def check_integrity(self, taken: Iterable[Place]) -> None:
        """Every unit is either free or in one of `taken`, once. Raises IntegrityError where not."""


def check_tiling(free: Iterable[Chunk], taken: Iterable[Chunk], num_units: int) -> None:
    """Free and taken chunks cover [0, num_units) once. Raises IntegrityError at the first place where they do not."""
    end = 0
    for start, size in sorted([*free, *taken]):
        if start != end:
            raise IntegrityError(
                f"{'gap' if start > end else 'overlap'}: a chunk ends at {end}, the next starts at {start}"
            )
        end = start + size
    if end != num_units:
        raise IntegrityError(f"the last chunk ends at {end} of {num_units} units")
