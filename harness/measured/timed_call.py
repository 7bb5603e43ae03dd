"""How long a call takes that starts work on a device, and waiting for such work."""

import time
from collections.abc import Callable

import torch


def seconds(call: Callable[[], object], device: torch.device | str) -> float:
    """Of one call, all that it started included: on a GPU by the GPU's own clock."""
    if torch.device(device).type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    first.record()
    call()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / 1e3


def wait_for(device: torch.device) -> None:
    """Wait until the device has done all that it was given; a CPU has done so when a call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """What a call launches on the GPU, as one graph: short kernels take less time than launching them one by one."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
