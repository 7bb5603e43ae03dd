"""A budget of memory mappings. Linux allows a process `vm.max_map_count` of them (65,530 by default).

Neighbouring page-groups whose file offsets ascend are one mapping to the kernel, so the count depends on how they
lie. The host driver reports every change; what else is mapped (libraries, heaps, stacks) is read from
/proc/self/maps, at the start and again whenever the budget runs low.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from kvarena.errors import UserError

_LIMIT = Path("/proc/sys/vm/max_map_count")
_MAPS = Path("/proc/self/maps")
_DEFAULT_LIMIT = 65530
_HEADROOM = 1024  # mappings left to the rest of the process: libraries, heaps, stacks of threads


def count_boundaries(handles: Sequence[int | None]) -> int:
    """Boundaries between mappings along a run of slots; None stands for a slot that is reserved only."""
    boundaries = 0
    for left, right in pairwise(handles):
        merges = right is None if left is None else right == left + 1
        boundaries += not merges
    return boundaries


class MappingBudget:
    """Mappings of this process, against the kernel's limit."""

    def __init__(self, limit: int | None = None, headroom: int = _HEADROOM) -> None:
        self.limit = limit if limit is not None else read_limit()
        self._headroom = headroom
        self._ours = 0  # made by drivers
        self._others: int | None = None  # made by everyone else, when last counted
        self._recount_at = 0  # total at which /proc/self/maps is read again

    @property
    def total(self) -> int:
        """Mappings of the process, as far as known."""
        if self._others is None:
            self._recount()
        return self._ours + (self._others or 0)

    def take(self, change: int) -> None:
        """Make room for a change in the number of mappings, before it is made. Raises UserError at the limit."""
        if change > 0 and self.total + change > self._recount_at:
            self._recount()
            if self.total + change > self.limit - self._headroom:
                raise UserError(self._message(change))
        self._ours += change

    def _recount(self) -> None:
        self._others = count_mappings() - self._ours
        remaining = self.limit - self._headroom - self._ours - self._others
        self._recount_at = self._ours + self._others + remaining // 2

    def _message(self, change: int) -> str:
        return (
            f"out of memory mappings: the process has {self.total} and needs {change} more, of vm.max_map_count="
            f"{self.limit} (of which {self._headroom} are kept for the rest of the process); "
            "use a larger allocator.page_group, allocator.tensor_slicing=true, a smaller batch or pool, "
            f"or raise the limit: sysctl -w vm.max_map_count={4 * self.limit}"
        )


def read_limit() -> int:
    """The kernel's limit on mappings of a process."""
    return int(_LIMIT.read_text()) if _LIMIT.exists() else _DEFAULT_LIMIT


def count_mappings() -> int:
    """Mappings of this process, counted by the kernel."""
    with _MAPS.open("rb") as maps:
        return sum(1 for _ in maps)


PROCESS_MAPPINGS = MappingBudget()  # the limit is the process's, so all drivers share one count
