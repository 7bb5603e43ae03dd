"""Do equal pools read equally fast? Streaming reads of pools that differ in the physical pages they got, and no more.

    ./run.sh benchmark memory_placement [--pools 6] [--mib 256]

Pools are created one after the other, as they come and with the machine's scattered free pages held back, and read in
random order with one thread. Where the intervals of two pools lie apart, so would those of two allocators that each
own one of them. CPU time of the thread; medians with 95 % intervals.
"""

import argparse
import random
from time import perf_counter, thread_time

import torch

from kvarena.allocators.sizes import MB, format_bytes
from kvarena.allocators.vmm.fragments import scattered_pages_held
from kvarena.allocators.vmm.host import HostDriver
from kvarena.allocators.vmm.tensor import strided_tensor
from kvarena.harness.record.statistics import Estimate, median_interval

ROUNDS = 20


def pool(num_bytes: int) -> torch.Tensor:
    """A pool as the resident stores take it: one page-group, faulted in and mapped whole."""
    driver = HostDriver(num_bytes)
    base = driver.reserve(num_bytes)
    driver.map(base, 0, driver.create(1))
    return strided_tensor(driver, base, torch.float32, (num_bytes // 4,), (4,))


def speeds(num_pools: int, num_bytes: int) -> list[Estimate]:
    """GB/s of each pool, in the order of creation."""
    pools = [pool(num_bytes) for _ in range(num_pools)]
    samples: list[list[float]] = [[] for _ in pools]
    for _ in range(ROUNDS):
        for i in random.sample(range(num_pools), num_pools):
            start = thread_time()
            pools[i].sum()
            samples[i].append(num_bytes / (thread_time() - start) / 1e9)
    return [median_interval(values) for values in samples]


def main() -> None:
    """Print the speed of every pool, and the fastest over the slowest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pools", type=int, default=6)
    parser.add_argument("--mib", type=int, default=256)
    given = parser.parse_args()
    torch.set_num_threads(1)
    as_they_come = speeds(given.pools, given.mib * MB)
    start = perf_counter()
    with scattered_pages_held() as held:
        print(f"held {format_bytes(held)} of scattered pages, taken in {perf_counter() - start:.1f} s")
        held_back = speeds(given.pools, given.mib * MB)
    for name, estimates in (("as they come", as_they_come), ("scattered pages held", held_back)):
        cells = "  ".join(f"{e:.1f}" for e in estimates)
        medians = [e.median for e in estimates]
        print(f"{name:22} GB/s: {cells}   fastest / slowest {max(medians) / min(medians):.2f}")


if __name__ == "__main__":
    main()
