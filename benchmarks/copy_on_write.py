"""Copy-on-write of 64 sequences in one step: our one call against 64 single copies, and against gather and scatter.

    python benchmarks/copy_on_write.py [--rounds 21]

For each of 64 sequences a block of the given size is copied in every tensor, K and V of 4 layers, in a pool larger
than the last-level cache. Variants are interleaved in one process, and each copies other blocks every round. Prints
medians and, for each, how much longer than our one call it takes: the median of the ratios in one round, with its
95 % interval. `single` are the ways to copy one block: torch's copy_ of a view, numpy's assignment, the C library's
memcpy in each tensor.
"""

import argparse
import ctypes
from collections.abc import Callable
from time import perf_counter

import numpy as np
import torch

from kvarena.allocators.memory.byte_copies import ByteCopies, Runs
from kvarena.allocators.sizes import KB, MB, format_bytes
from kvarena.harness.record.statistics import median_interval

SEQUENCES, TENSORS = 64, 8
SIZES = (8 * KB, 32 * KB, 128 * KB, 512 * KB, MB)  # in one tensor
POOL_BYTES = 1024 * MB

_memcpy = ctypes.CDLL(None).memcpy
_memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_memcpy.restype = ctypes.c_void_p

Variant = Callable[[list[int], list[int]], None]


def variants(pool: torch.Tensor) -> dict[str, Variant]:
    """Ways to copy blocks `sources` of a pool [tensors, N, words] to blocks `targets`."""
    size, bases, array = pool[0, 0].nbytes, [tensor.data_ptr() for tensor in pool], pool.numpy()
    copies = ByteCopies(bases, pool.device)

    def one_call(sources: list[int], targets: list[int]) -> None:
        copies(Runs.of_blocks(sources, targets, size))

    def single_torch(sources: list[int], targets: list[int]) -> None:
        for s, t in zip(sources, targets, strict=True):
            pool[:, t].copy_(pool[:, s])

    def single_numpy(sources: list[int], targets: list[int]) -> None:
        for s, t in zip(sources, targets, strict=True):
            array[:, t] = array[:, s]

    def single_memcpy(sources: list[int], targets: list[int]) -> None:
        for s, t in zip(sources, targets, strict=True):
            for base in bases:
                _memcpy(base + t * size, base + s * size, size)

    def gather_scatter(sources: list[int], targets: list[int]) -> None:
        pool[:, targets] = pool[:, sources]

    return {f.__name__: f for f in (one_call, single_torch, single_numpy, single_memcpy, gather_scatter)}


def measure(size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of every variant, round by round; each round in another order."""
    pool = torch.ones((TENSORS, POOL_BYTES // TENSORS // size, size // 4))  # written: no page is left to fault in
    ways = variants(pool)
    rng = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        names = list(ways)
        rng.shuffle(names)
        for name in names:
            blocks = rng.permutation(pool.shape[1])[: 2 * SEQUENCES].tolist()
            start = perf_counter()
            ways[name](blocks[:SEQUENCES], blocks[SEQUENCES:])
            if number:  # the first round warms up
                seconds[name].append(perf_counter() - start)
    return seconds


def main() -> None:
    """Print a line for each block size and variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    for size in SIZES:
        seconds = measure(size, rounds)
        for name, times in seconds.items():
            ratio, _, low, high = median_interval(np.array(times) / np.array(seconds["one_call"]))
            print(
                f"{format_bytes(size):>6} x {SEQUENCES}  {name:15} {np.median(times) * 1e6:9.0f} us   "
                f"{ratio:5.2f} x our one call [{low:.2f}, {high:.2f}]"
            )


if __name__ == "__main__":
    main()
