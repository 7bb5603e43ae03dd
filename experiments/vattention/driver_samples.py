"""Samples of a driver's calls: what one page-group takes in its life, and the same calls at one point of a sweep.

A sample is (kind of system call, microseconds of one).
"""

from collections.abc import Callable

import pandas as pd

from kvarena.allocators.vmm.driver import Driver
from kvarena.allocators.vmm.drivers import make_driver
from kvarena.experiments.vattention.driver_calls import computing, timed_us
from kvarena.harness.record.record import Frames

Sample = tuple[str, float]


def lives(device: str, sizes: list[int], rounds: int, before: Callable[[], None] = lambda: None) -> Frames:
    """One page-group after the other goes through every call; sizes take turns."""
    samples: list[dict[str, object]] = []
    for number in range(-1, rounds):
        for size in sizes:
            taken = _one_life(device, size, before)
            if number >= 0:  # the first round loads what loads once
                samples += [{"round": number, "page_group": size, "kind": k, "us": us} for k, us in taken]
    return {"samples": pd.DataFrame(samples)}


def lives_beside_kernels(device: str, sizes: list[int], rounds: int) -> Frames:
    """The same while the device computes."""
    with computing(device) as top_up:
        return lives(device, sizes, rounds, top_up)


def _one_life(device: str, size: int, before: Callable[[], None]) -> list[Sample]:
    """(kind, microseconds) of the calls that one page-group takes."""
    driver = make_driver(device, size)
    try:
        before()
        driver.idle()
        base = driver.reserve(size)
        handles = driver.create(1)
        driver.map(base, 0, handles)
        driver.unmap(base, 0, 1)
        driver.release(handles)
        driver.free(base)
        return [(kind, totals.ns / totals.calls / 1e3) for kind, totals in driver.calls.items()]
    finally:
        driver.close()


Point = Callable[[int], list[Sample]]  # what is there before the calls -> their samples


def sweep(rounds: int, points: list[int], measure: Point) -> Frames:
    """Rounds over all points, one sample per round, point and kind of call."""
    samples = [
        {"round": number, "x": x, "kind": kind, "us": us}
        for number in range(rounds)
        for x in points
        for kind, us in measure(x)
    ]
    return {"samples": pd.DataFrame(samples)}


def with_mapped(device: str, size: int, calls: int, mapped: int) -> list[Sample]:
    """Map and unmap while a page-group is mapped at so many addresses, every second slot, so that none merge."""
    driver = make_driver(device, size)
    try:
        base, handles = driver.reserve((2 * mapped + 1) * size), driver.create(2)
        for i in range(mapped):
            driver.map(base, 2 * i * size, handles[:1])
        return _medians(calls, lambda: _map_and_unmap(driver, base, 2 * mapped * size, handles[1:]))
    finally:
        driver.close()


def with_created(device: str, size: int, calls: int, created: int) -> list[Sample]:
    """Create, map, unmap and release one more where so many page-groups exist."""
    driver = make_driver(device, size)
    try:
        base = driver.reserve(size)
        driver.create(created)

        def life() -> dict[str, float]:
            handles: list[int] = []
            creation = timed_us(driver, lambda: handles.extend(driver.create(1)))
            mapping = _map_and_unmap(driver, base, 0, handles)
            return creation | mapping | timed_us(driver, lambda: driver.release(handles))

        return _medians(calls, life)
    finally:
        driver.close()


def in_runs(device: str, size: int, calls: int, length: int) -> list[Sample]:
    """Map and unmap runs; microseconds per page-group."""
    driver = make_driver(device, size)
    try:
        base, handles = driver.reserve(length * size), driver.create(length)
        taken = _medians(max(1, calls // length), lambda: _map_and_unmap(driver, base, 0, handles))
        return [(kind, us / length) for kind, us in taken]
    finally:
        driver.close()


def _map_and_unmap(driver: Driver, base: int, offset: int, handles: list[int]) -> dict[str, float]:
    mapping = timed_us(driver, lambda: driver.map(base, offset, handles))
    return mapping | timed_us(driver, lambda: driver.unmap(base, offset, len(handles)))


def _medians(calls: int, step: Callable[[], dict[str, float]]) -> list[Sample]:
    """Median by kind of so many repetitions."""
    return list(pd.DataFrame(step() for _ in range(calls)).median().items())  # type: ignore[arg-type]  # kinds are str
