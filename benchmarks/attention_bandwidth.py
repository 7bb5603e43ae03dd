"""How near decode attention comes to what memory gives: GB/s of K/V read, over a plain reduction of the same bytes.

    .venv/bin/python -P benchmarks/attention_bandwidth.py [--quick] [--dtype bfloat16] [--kernels numba sdpa]

One buffer of K/V serves as rows, as blocks in order and as scattered blocks. Every round reads it once with each kernel
and layout, in turn, between two plain reductions; a ratio is a kernel's GB/s over the mean of its round's two readings.
One thread. Goal for numba, contiguous, float32, batch 64, context 2048: 0.43, better 0.6.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kvarena.harness.statistics import median_interval
from kvarena.kernels.catalogue import CATALOGUE
from kvarena.kernels.layout import Layout
from kvarena.kernels.registry import fits, get_kernel
from kvarena.kernels.threads import set_compute_threads
from kvarena.kernels.view import BatchView, LayerCache

READ = "read-only reduction"
BASE = ("numba", "rows")
GOAL = 0.43

Line = tuple[str, str]  # kernel, arrangement


def arguments() -> argparse.Namespace:
    """Shapes default to those of the goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="batch 16, context 1024, six rounds")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--query-heads", type=int, default=32)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--kernels", nargs="+", choices=CATALOGUE, default=["numba", "sdpa", "gather_sdpa"])
    given = parser.parse_args()
    if given.quick:
        given.batch, given.context, given.rounds = 16, 1024, 6
    return given


def make_views(given: argparse.Namespace, k: Tensor, v: Tensor) -> dict[str, tuple[LayerCache, BatchView]]:
    """The same bytes as rows and as blocks."""
    batch, context, size = given.batch, given.context, given.block_size
    lengths = torch.full((batch,), context, dtype=torch.int32)
    starts = torch.arange(batch + 1, dtype=torch.int32)
    blocks = torch.arange(batch * context // size, dtype=torch.int32)
    paged = LayerCache(Layout.PAGED, *(x.view(-1, size, *x.shape[2:]) for x in (k, v)))

    def table(order: Tensor) -> BatchView:
        return BatchView(lengths, starts, None, blocks[order].view(batch, -1), context, 1)

    return {
        "rows": (
            LayerCache(Layout.CONTIGUOUS, k, v),
            BatchView(lengths, starts, torch.arange(batch), None, context, 1),
        ),
        "ordered blocks": (paged, table(torch.arange(len(blocks)))),
        "scattered blocks": (paged, table(torch.randperm(len(blocks)))),
    }


def calls(given: argparse.Namespace) -> tuple[Callable[[], object], dict[Line, Callable[[], None]], int]:
    """The plain reduction, every kernel on every arrangement that it reads, and the bytes that each reads."""
    dtype = getattr(torch, given.dtype)
    torch.manual_seed(0)
    k, v = torch.empty(2, given.batch, given.context, given.kv_heads, given.head_size, dtype=dtype)
    for x in (k, v):
        x[:] = torch.randn(x.shape[1:])
    q = torch.randn(given.batch, given.query_heads, given.head_size).to(dtype)
    out = torch.empty_like(q)
    words = [x.view(torch.int64) for x in (k, v)]
    lines: dict[Line, Callable[[], None]] = {}
    for name in given.kernels:
        kernel = get_kernel(name)
        for arrangement, (cache, view) in make_views(given, k, v).items():
            if fits(kernel.spec, cache.layout, "cpu", given.dtype, given.head_size, given.block_size) is None:
                lines[name, arrangement] = partial(kernel.decode, q, cache, view, out)
    return lambda: [x.sum() for x in words], lines, 2 * k.nbytes


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    given = arguments()
    set_compute_threads(1)
    read, lines, num_bytes = calls(given)
    for call in (read, *lines.values()):
        call()  # compile, and fault pages in
    rates: dict[Line, list[float]] = {line: [] for line in lines}
    shares: dict[Line, list[float]] = {line: [] for line in lines}
    readings = []
    for number in range(given.rounds):
        turn = number % len(lines)
        before = seconds(read)
        taken = {line: seconds(lines[line]) for line in [*list(lines)[turn:], *list(lines)[:turn]]}
        after = seconds(read)
        reading = (num_bytes / before + num_bytes / after) / 2e9
        readings.append(reading)
        for line, time_s in taken.items():
            rates[line].append(num_bytes / time_s / 1e9)
            shares[line].append(num_bytes / time_s / 1e9 / reading)
    report(given, readings, rates, shares)


def report(
    given: argparse.Namespace, readings: list[float], rates: dict[Line, list[float]], shares: dict[Line, list[float]]
) -> None:
    """Medians with 95 % intervals."""
    print(
        f"{given.dtype}, batch {given.batch}, context {given.context}, {given.kv_heads} KV heads, "
        f"{given.query_heads} query heads of {given.head_size}, blocks of {given.block_size}, 1 thread, "
        f"n = {given.rounds}"
    )
    print(f"{READ:33} {shown(readings)} GB/s")
    for (kernel, arrangement), samples in rates.items():
        ratios = shares[kernel, arrangement]
        print(f"{kernel:14} {arrangement:18} {shown(samples)} GB/s   of the reading {shown(ratios)}")
    if BASE in rates:
        for line in (line for line in rates if line[0] == BASE[0] and line != BASE):
            cost = [rows / blocks for rows, blocks in zip(rates[BASE], rates[line], strict=True)]
            print(f"one body, time of {line[1]} over rows: {shown(cost)}")
        print(f"goal: {' on '.join(BASE)} at least {GOAL} of the reading: {median_interval(shares[BASE]).median:.2f}")


def shown(samples: list[float]) -> str:
    """Median and interval."""
    estimate = median_interval(samples)
    return f"{estimate.median:6.2f} [{estimate.ci_low:6.2f}, {estimate.ci_high:6.2f}]"


if __name__ == "__main__":
    main()
