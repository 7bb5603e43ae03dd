"""The calls of a virtual-memory driver, timed by the driver itself, and how its results are labelled."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvarena.allocators.sizes import parse_bytes
from kvarena.allocators.vmm.driver import Driver
from kvarena.errors import UserError

# What a call is named in a table: on a GPU as vAttention's Table 3 names it, on the host by what does the same there.
SYSTEM_CALLS = {
    "cpu": {
        "reserve": "reserve: mmap(PROT_NONE)",
        "create": "create: fallocate",
        "map": "map: mmap(MAP_FIXED)",
        "unmap": "unmap: mmap(PROT_NONE)",
        "release": "release: fallocate(PUNCH_HOLE)",
        "free": "free: munmap",
    },
    "cuda": {
        "reserve": "cuMemAddressReserve",
        "create": "cuMemCreate",
        "map": "cuMemMap",
        "set_access": "cuMemSetAccess",
        "unmap": "cuMemUnmap",
        "release": "cuMemRelease",
        "free": "cuMemAddressFree",
    },
}

SIDE = 4096  # of the matrices that keep a GPU at work


def timed_us(driver: Driver, call: Callable[[], object]) -> dict[str, float]:
    """Make a call of the contract; microseconds that the driver spent in the system, by kind of system call."""
    before = dict(driver.calls)
    call()
    return {
        kind: (totals.ns - (before[kind].ns if kind in before else 0)) / 1e3
        for kind, totals in driver.calls.items()
        if totals != before.get(kind)
    }


def page_groups_of(sizes: list[str], key: str = "params.page_groups") -> list[int]:
    """Bytes of the page-groups that a run asks for. Raises UserError where it asks for none, or for one twice."""
    parsed = [parse_bytes(size, key) for size in sizes]
    if not parsed or len(set(parsed)) < len(parsed):
        raise UserError(f"{key}={sizes}: name at least one, and none twice")
    return parsed


def check_counts(params: object, *keys: str) -> None:
    """Raises UserError where a list of counts is empty, not ascending, or has one below 1; or a number is below 1."""
    for key in keys:
        value = getattr(params, key)
        counts = value if isinstance(value, list) else [value]
        if not counts or min(counts) < 1 or sorted(set(counts)) != counts:
            raise UserError(f"params.{key}={value}: at least 1 is needed, each one once, in ascending order")


@contextmanager
def computing(device: str) -> Iterator[Callable[[], None]]:
    """Keep the device at work meanwhile. What is yielded tops the work up: to be called before each measurement.

    A CPU gets a thread that multiplies matrices, a GPU some milliseconds of kernels in its queue.
    """
    import torch

    if device == "cuda":
        matrix = torch.randn(SIDE, SIDE, device=device)

        def top_up() -> None:
            torch.cuda.synchronize()
            for _ in range(16):
                matrix @ matrix

        yield top_up
        torch.cuda.synchronize()
        return
    stop = threading.Event()

    def multiply() -> None:
        matrix = torch.randn(512, 512)
        while not stop.is_set():
            matrix @ matrix

    worker = threading.Thread(target=multiply, daemon=True)
    worker.start()
    try:
        yield lambda: None
    finally:
        stop.set()
        worker.join()
