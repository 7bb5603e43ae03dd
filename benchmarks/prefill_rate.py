"""What a prefill reaches: GFLOP/s of causal attention over those of a matrix product, one thread, interleaved.

    .venv/bin/python -P benchmarks/prefill_rate.py [--tokens 1024] [--dtype bfloat16] [--kernels numba sdpa]

Counts 4 x head size flops for every query head, query and position that it sees. A ratio is a kernel's rate over
torch's float32 product of two square matrices of 1024 in the same round.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch

from kvarena.harness.record.statistics import median_interval
from kvarena.kernels.catalogue import CATALOGUE
from kvarena.kernels.layout import Layout
from kvarena.kernels.random_batch import Shapes, random_batch
from kvarena.kernels.registry import get_kernel
from kvarena.kernels.threads import set_compute_threads

SQUARE = 1024


def rate(flops: float, call: Callable[[], object]) -> float:
    """GFLOP/s of one call."""
    start = time.perf_counter()
    call()
    return flops / (time.perf_counter() - start) / 1e9


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--kernels", nargs="+", choices=CATALOGUE, default=["numba", "sdpa", "gather_sdpa"])
    given = parser.parse_args()
    set_compute_threads(1)
    shapes = Shapes(heads=8, group=4, size=128, dtype=getattr(torch, given.dtype))
    flops = 4 * shapes.size * shapes.heads * shapes.group * given.tokens * (given.tokens + 1) / 2
    calls: dict[str, Callable[[], None]] = {}
    for name in given.kernels:
        kernel = get_kernel(name)
        block_size = None if Layout.CONTIGUOUS in kernel.spec.layouts else 16
        q, cache, view = random_batch(shapes, [given.tokens], [given.tokens], block_size)
        calls[name] = partial(kernel.prefill, q, cache, view, torch.empty_like(q))
    square = torch.randn(SQUARE, SQUARE)
    rates: dict[str, list[float]] = {name: [] for name in calls}
    shares: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(given.rounds):
        product = rate(2 * SQUARE**3, lambda: square @ square)
        for name, call in calls.items():
            rates[name].append(rate(flops, call))
            shares[name].append(rates[name][-1] / product)
    print(f"{given.dtype}, one prompt of {given.tokens} tokens, 8 KV heads, 32 query heads of 128, n = {given.rounds}")
    for name in calls:
        gflops, share = median_interval(rates[name]), median_interval(shares[name])
        print(f"{name:14} {gflops:6.1f} GFLOP/s   of the product {share:.2f}")


if __name__ == "__main__":
    main()
