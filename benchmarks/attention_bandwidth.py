"""How near decode attention comes to what memory gives: GB/s of K/V read, over a plain reduction of the same bytes.

    .venv/bin/python -P benchmarks/attention_bandwidth.py [--quick] [--dtype bfloat16] [--kernels numba sdpa]

One buffer of K/V serves as rows, as blocks in order and as scattered blocks. Every round reads it once with each kernel
and layout, in turn, between two plain reductions; a ratio is a kernel's GB/s over the mean of its round's two readings.
One thread. Goal for numba, contiguous, float32, batch 64, context 2048: 0.43, better 0.6.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch

from kvarena.harness.measured.timed_call import seconds
from kvarena.harness.record.statistics import median_interval
from kvarena.kernels.arrangement import Arrangement, arranged
from kvarena.kernels.catalogue import CATALOGUE
from kvarena.kernels.registry import fits, get_kernel
from kvarena.kernels.threads import set_compute_threads

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
    places = {
        "rows": Arrangement(None),
        "ordered blocks": Arrangement(given.block_size),
        "scattered blocks": Arrangement(given.block_size, scattered=True),
    }
    lines: dict[Line, Callable[[], None]] = {}
    for name in given.kernels:
        kernel = get_kernel(name)
        for place, arrangement in places.items():
            if fits(kernel.spec, arrangement.layout, "cpu", given.dtype, given.head_size, given.block_size) is None:
                cache, [view] = arranged(k, v, arrangement, given.batch, given.context)
                lines[name, place] = partial(kernel.decode, q, cache, view, out)
    return lambda: [x.sum() for x in words], lines, 2 * k.nbytes


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
        before = seconds(read, "cpu")
        taken = {line: seconds(lines[line], "cpu") for line in [*list(lines)[turn:], *list(lines)[:turn]]}
        after = seconds(read, "cpu")
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
    print(f"{READ:33} {median_interval(readings):6.2f} GB/s")
    for (kernel, arrangement), samples in rates.items():
        rate, share = median_interval(samples), median_interval(shares[kernel, arrangement])
        print(f"{kernel:14} {arrangement:18} {rate:6.2f} GB/s   of the reading {share:.2f}")
    if BASE in rates:
        for line in (line for line in rates if line[0] == BASE[0] and line != BASE):
            cost = [rows / blocks for rows, blocks in zip(rates[BASE], rates[line], strict=True)]
            print(f"one body, time of {line[1]} over rows: {median_interval(cost):.2f}")
        print(f"goal: {' on '.join(BASE)} at least {GOAL} of the reading: {median_interval(shares[BASE]).median:.2f}")


if __name__ == "__main__":
    main()
