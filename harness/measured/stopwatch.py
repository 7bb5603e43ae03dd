"""Seconds by phase of one step, on a CPU or on a GPU's own clock."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up named phases of a step. On a GPU phases are pairs of events, read when the step has ended.

    Between two events lies the device's work only where its queue did not run empty meanwhile: else the host's
    launching is in it. `queue_full` says whether the last step's never did, from one phase to the next.
    """

    queue_full = True  # of a CPU, which queues nothing

    def __init__(self, device: torch.device) -> None:
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] | None = (
            [] if device.type == "cuda" else None
        )
        self._seconds: dict[str, float] = {}
        self._ran_empty = False

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a region of device work."""
        if self._events is None:
            start = time.perf_counter()
            yield
            self.add(name, time.perf_counter() - start)
        else:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            self._ran_empty |= bool(self._events) and self._events[-1][2].query()  # type: ignore[no-untyped-call]
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
            self.queue_full, self._ran_empty = not self._ran_empty, False
        seconds, self._seconds = self._seconds, {}
        return seconds
