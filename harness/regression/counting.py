"""Counting what allocators do, from outside.

Arenas are patched for the length of a replay: a counter of their own would cost every replay, and taking a block is
the one thing that has to be cheap.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from kvarena.allocators.free_list import FreeList
from kvarena.allocators.reservation.best_fit import BestFitAllocator
from kvarena.allocators.reservation.buddy import BuddyAllocator
from kvarena.allocators.vattention.page_groups import PageGroupPool
from kvarena.harness.scheduler.step import StepPlan

# Every class that gives out units of a pool: blocks, chunks, rows, page-groups. A block pool is a FreeList.
_ARENAS: tuple[type[Any], ...] = (FreeList, BuddyAllocator, BestFitAllocator, PageGroupPool)


class Takes:
    """Units that arenas have given out, and the most that one of them had out at once."""

    def __init__(self) -> None:
        self.units = 0
        self.peak = 0

    def counting(self, take: Callable[..., Any]) -> Callable[..., Any]:
        """`take`, counted."""

        def counted(arena: Any, *arguments: Any, **named: Any) -> Any:
            before = _units_out(arena)
            taken = take(arena, *arguments, **named)
            after = _units_out(arena)
            self.units += after - before
            self.peak = max(self.peak, after)
            return taken

        return counted


@contextmanager
def counted_takes() -> Iterator[Takes]:
    """Count what all arenas give out, until the end of the block."""
    takes = Takes()
    with ExitStack() as stack:
        for arena in _ARENAS:
            stack.enter_context(patch.object(arena, "take", takes.counting(arena.take)))
        yield takes


def _units_out(arena: Any) -> int:
    if isinstance(arena, PageGroupPool):
        return arena.size - len(arena)
    return int(arena.num_units - arena.free_units)


class PlanCounts:
    """Counts actions by kind, those beside the forward pass included, and admissions: it watches an engine."""

    def __init__(self) -> None:
        self.actions: Counter[str] = Counter()
        self.admissions = 0

    def __call__(self, plan: StepPlan) -> None:
        """Count one step, or many, which admit nobody."""
        self.actions.update(type(action).__name__ for action in (*plan.actions, *plan.ahead))
        self.admissions += sum(chunk.start == 0 for chunk in plan.prefills)
