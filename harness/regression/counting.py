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
from kvarena.allocators.vattention.slabs import SlabList
from kvarena.harness.modelled.modelled_executor import ModelledExecutor
from kvarena.harness.modelled.step_model import SteadyRun
from kvarena.harness.scheduler.step import StepPlan, StepTime

# Every class that gives out units of a pool: blocks, chunks, rows, slabs. A block pool is a FreeList.
_ARENAS: tuple[type[Any], ...] = (FreeList, BuddyAllocator, BestFitAllocator, SlabList)


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
    if isinstance(arena, SlabList):
        return arena.num_slabs - len(arena)
    return int(arena.num_units - arena.free_units)


class CountingExecutor(ModelledExecutor):
    """A modelled executor that counts actions by kind, those beside the forward pass included, and admissions."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.actions: Counter[str] = Counter()
        self.admissions = 0

    def execute(self, plan: StepPlan) -> StepTime:
        """Price and count one step."""
        self._count(plan)
        self.admissions += sum(chunk.start == 0 for chunk in plan.prefills)
        return super().execute(plan)

    def stretch(self, plan: StepPlan, run: SteadyRun) -> StepTime:
        """Price and count many steps, which admit nobody."""
        self._count(plan)
        return super().stretch(plan, run)

    def _count(self, plan: StepPlan) -> None:
        self.actions.update(type(action).__name__ for action in (*plan.actions, *plan.ahead))
