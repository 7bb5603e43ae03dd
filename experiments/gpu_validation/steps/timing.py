"""Seconds of work on a device: by its own clock on a GPU."""

import time
from collections.abc import Callable

import torch


def seconds(call: Callable[[], object], device: str) -> float:
    """Of one call, all that it started included."""
    if device != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    first.record()
    call()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / 1e3
