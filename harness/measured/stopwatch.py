"""Seconds by phase of one step, on a CPU or on a GPU's own clock."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up named phases of a step. On a GPU phases are pairs of events, read when the step has ended."""

    def __init__(self, device: torch.device) -> None:
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] | None = (
            [] if device.type == "cuda" else None
        )
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a region of device work."""
        if self._events is None:
            start = time.perf_counter()
            yield
            self.add(name, time.perf_counter() - start)
        else:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            first.record()
            yield
            last.record()
            self._events.append((name, first, last))

    def add(self, name: str, seconds: float) -> None:
        """Add host seconds to a phase."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def read(self) -> dict[str, float]:
        """Seconds by phase since the last reading; waits for the GPU."""
        if self._events:
            torch.cuda.synchronize()
            for name, first, last in self._events:
                self.add(name, first.elapsed_time(last) / 1e3)
            self._events.clear()
        seconds, self._seconds = self._seconds, {}
        return seconds
