"""What the host driver's calls cost, by page-group size and by mappings present: vAttention's Table 3 on this machine.

    .venv/bin/python -P benchmarks/vmm_latency.py [--quick]

One call covers one page-group. `remap` maps a page-group once more; `run of 8` is an eighth of one call over 8 that
ascend. The ratio compares writing a page-group that was mapped with its page tables filled in, mapping included, with
writing one whose pages still have to fault. Sizes are interleaved; medians with 95 % intervals.
"""

import argparse
import ctypes
import mmap
from collections import defaultdict
from collections.abc import Callable
from time import perf_counter_ns

from kvarena.allocators.sizes import KB, format_bytes
from kvarena.allocators.vattention.page_groups import PAGE_GROUPS
from kvarena.allocators.vmm.host import HostDriver
from kvarena.harness.record.statistics import median_interval

PRESENT = (0, 1_000, 10_000, 50_000)  # mappings of the process before it maps one more


def timed_us(call: Callable[[], object]) -> float:
    """Microseconds of one call."""
    start = perf_counter_ns()
    call()
    return (perf_counter_ns() - start) / 1e3


def one_life(size: int, samples: dict[str, list[float]]) -> None:
    """Take one page-group through every call; add its microseconds."""
    driver = HostDriver(size)
    driver.create(1)  # the memfd's own first costs
    base = driver.reserve(64 * size)
    samples["create"].append(timed_us(lambda: driver.create(1)))
    [handle] = driver.create(1)
    for kind in ("map", "remap"):
        samples[kind].append(timed_us(lambda: driver.map(base, 8 * size, [handle])))
        samples["unmap"].append(timed_us(lambda: driver.unmap(base, 8 * size, 1)))
    handles = driver.create(8)
    samples["run of 8"].append(timed_us(lambda: driver.map(base, 16 * size, handles)) / 8)
    samples["release"].append(timed_us(lambda: driver.release([handle])))
    driver.close()


def populated_over_faulting(size: int) -> float:
    """Map and write a page-group, our way over the plain one."""
    driver = HostDriver(size)
    base, [handle] = driver.reserve(size), driver.create(1)

    def ours() -> None:
        driver.map(base, 0, [handle])
        ctypes.memset(base, 1, size)

    def plain() -> None:
        with mmap.mmap(driver._fd, size) as pages:
            ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(pages)), 1, size)

    ours()
    driver.unmap(base, 0, 1)
    ratio = timed_us(ours) / timed_us(plain)
    driver.close()
    return ratio


def with_mappings_present(present: int, calls: int) -> tuple[list[float], list[float]]:
    """Map and unmap latencies of 64 KB with so many mappings around: every second slot, so that none merge."""
    size = 64 * KB
    driver = HostDriver(size)
    base, handles = driver.reserve((present + 2 * calls) * size), driver.create(calls)
    for slot in range(0, present, 2):  # one page-group, many aliases: a mapping each, and the hole after it
        driver.map(base, slot * size, handles[:1])
    maps = [timed_us(lambda i=i: driver.map(base, (present + 2 * i) * size, [handles[i]])) for i in range(calls)]
    unmaps = [timed_us(lambda i=i: driver.unmap(base, (present + 2 * i) * size, 1)) for i in range(calls)]
    driver.close()
    return maps, unmaps


def cell(values: list[float]) -> str:
    """Median and interval."""
    return f"{median_interval(values):.1f}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    rounds = 20 if parser.parse_args().quick else 200
    samples: dict[int, dict[str, list[float]]] = {size: defaultdict(list) for size in PAGE_GROUPS}
    for _ in range(rounds):
        for size in PAGE_GROUPS:
            one_life(size, samples[size])
            samples[size]["map + write, populated over faulting"].append(populated_over_faulting(size))
    print(f"{'microseconds per page-group':36}" + "".join(f"{format_bytes(size):>26}" for size in PAGE_GROUPS))
    for kind in samples[PAGE_GROUPS[0]]:
        print(f"{kind:36}" + "".join(f"{cell(samples[size][kind]):>26}" for size in PAGE_GROUPS))
    print(f"\n{'64KB, by mappings present':36}{'map':>26}{'unmap':>26}{'map, over none present':>26}")
    none = 1.0
    for present in PRESENT[:3] if rounds == 20 else PRESENT:
        maps, unmaps = with_mappings_present(present, 10 * rounds)
        none = none if present else median_interval(maps).median
        print(f"{present:36}{cell(maps):>26}{cell(unmaps):>26}{median_interval(maps).median / none:26.2f}")


if __name__ == "__main__":
    main()
