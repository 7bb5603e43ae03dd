"""The two clocks of a replay, both in integer picoseconds from its start.

A replay never sleeps: where nobody runs or waits, either clock skips to the next arrival.
"""

import time
from abc import ABC, abstractmethod

from kvarena.harness.scheduler.step import StepTime


class Clock(ABC):
    """Time as the scheduler sees it."""

    now_ps: int = 0

    @abstractmethod
    def pass_step(self, step: StepTime) -> None:
        """Move to the end of a step."""

    @abstractmethod
    def skip_to(self, time_ps: int) -> None:
        """Skip idle time, up to an arrival."""


class ModelledClock(Clock):
    """Virtual time: the sum of what the steps are said to take; deciding them takes none."""

    def pass_step(self, step: StepTime) -> None:
        """Add the step's duration."""
        self.now_ps += step.duration_ps

    def skip_to(self, time_ps: int) -> None:
        """Jump there."""
        self.now_ps = time_ps


class WallClock(Clock):
    """Wall time without the idle stretches: scheduling, bookkeeping and the step all count."""

    def __init__(self) -> None:
        self._origin_ns = time.perf_counter_ns()

    def pass_step(self, step: StepTime) -> None:
        """Read the wall, whatever the step says of itself."""
        self.now_ps = (time.perf_counter_ns() - self._origin_ns) * 1000

    def skip_to(self, time_ps: int) -> None:
        """Move the origin, so that it is `time_ps` now."""
        self._origin_ns = time.perf_counter_ns() - time_ps // 1000
        self.now_ps = time_ps
