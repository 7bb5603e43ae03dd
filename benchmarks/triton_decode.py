"""How near the GPU's decode kernels come to what its memory gives, and which tiles and splits suit ours best.

    .venv/bin/python -P benchmarks/triton_decode.py [--batch 32 --context 16384] [--kernels triton fa3 flashinfer]
    .venv/bin/python -P benchmarks/triton_decode.py --sweep

One buffer of K/V, larger than the cache, serves as rows, as blocks in order and as scattered blocks. Every round reads
it once with each kernel and arrangement, in turn, between two plain reductions; a ratio is a kernel's GB/s over the
mean of its round's two readings. `--sweep` takes our kernel alone, through shapes that `triton_launch` may choose from.
Goals: FA3 or FlashInfer at least 0.85 of the reading, ours at least 0.7 of FA3.
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from functools import partial

import torch

from kvarena.harness.measured.timed_call import seconds
from kvarena.harness.record.statistics import median_interval
from kvarena.kernels.arrangement import Arrangement, arranged
from kvarena.kernels.catalogue import CATALOGUE
from kvarena.kernels.kernel import AttentionKernel
from kvarena.kernels.registry import fits, get_kernel, kernel_spec, missing

GPU_KERNELS = [name for name, (spec, *_) in CATALOGUE.items() if spec.devices == {"cuda"}]
Call = Callable[[], None]


def arguments() -> argparse.Namespace:
    """Shapes default to Llama-3-8B's heads, and to the goal's batch and context."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--query-heads", type=int, default=32)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--kernels", nargs="+", choices=GPU_KERNELS, default=GPU_KERNELS)
    return parser.parse_args()


def chosen(given: argparse.Namespace) -> dict[str, tuple[AttentionKernel, int]]:
    """The kernels to time, and the block size of each; what is absent is said, not timed."""
    if given.sweep:
        return sweep(given.block_size)
    kernels = {}
    for name in given.kernels:
        spec = kernel_spec(name)
        if reason := missing(spec):
            print(f"{name}: {reason}")
            continue
        takes = spec.block_sizes is None or given.block_size in spec.block_sizes
        kernels[name] = get_kernel(name), given.block_size if takes else max(spec.block_sizes or ())
    return kernels


def sweep(block_size: int) -> dict[str, tuple[AttentionKernel, int]]:
    """Our kernel, with shapes of one program and tokens of one split."""
    from kvarena.kernels.triton_attention import TritonAttention
    from kvarena.kernels.triton_launch import Tiles

    return {
        f"tile {tile}, warps {warps}, stages {stages}, split {split}": (
            TritonAttention(Tiles(16, tile, warps, stages), split),
            block_size,
        )
        for tile, warps, stages, split in itertools.product((32, 64, 128), (2, 4), (2, 3, 5), (512, 1024, 4096))
        if tile * stages <= 384  # as much as a multiprocessor holds
    }


def calls(given: argparse.Namespace) -> tuple[Call, dict[str, Call], int]:
    """The plain reduction, every kernel on every arrangement that it reads, and the bytes that each reads."""
    torch.manual_seed(0)
    shape = (2, given.batch, given.context, given.kv_heads, given.head_size)
    k, v = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    q = torch.randn(given.batch, given.query_heads, given.head_size, device="cuda", dtype=torch.bfloat16)
    lines: dict[str, Call] = {}
    for name, (kernel, block_size) in chosen(given).items():
        places = {
            "rows": Arrangement(None),
            f"ordered blocks of {block_size}": Arrangement(block_size),
            f"scattered blocks of {block_size}": Arrangement(block_size, scattered=True),
        }
        for place, arrangement in places.items():
            if fits(kernel.spec, arrangement.layout, "cuda", "bfloat16", given.head_size, block_size) is None:
                cache, [view] = arranged(k, v, arrangement, given.batch, given.context)
                lines[f"{name}, {place}"] = partial(kernel.decode, q, cache, view, torch.empty_like(q))
    words = [x.view(torch.int64) for x in (k, v)]
    return lambda: [x.sum() for x in words] and None, lines, 2 * k.nbytes


def runs(name: str, call: Call) -> bool:
    """Whether it runs at all: compile it, and say what failed."""
    try:
        seconds(call, "cuda")
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
        return False
    return True


def main() -> None:
    """Measure and print."""
    given = arguments()
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA GPU")
    read, lines, num_bytes = calls(given)
    lines = {name: call for name, call in lines.items() if runs(name, call)}
    rates: dict[str, list[float]] = {name: [] for name in lines}
    shares: dict[str, list[float]] = {name: [] for name in lines}
    readings = []
    seconds(read, "cuda")
    for number in range(given.rounds):
        turn = number % len(lines)
        before = seconds(read, "cuda")
        taken = {name: seconds(lines[name], "cuda") for name in [*list(lines)[turn:], *list(lines)[:turn]]}
        reading = (num_bytes / before + num_bytes / seconds(read, "cuda")) / 2e9
        readings.append(reading)
        for name, time_s in taken.items():
            rates[name].append(num_bytes / time_s / 1e9)
            shares[name].append(rates[name][-1] / reading)
    report(given, readings, rates, shares)


def report(
    given: argparse.Namespace, readings: list[float], rates: dict[str, list[float]], shares: dict[str, list[float]]
) -> None:
    """Medians with 95 % intervals, fastest first."""
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16, batch {given.batch}, context "
        f"{given.context}, {given.kv_heads} KV heads, {given.query_heads} query heads of {given.head_size}, "
        f"n = {given.rounds}"
    )
    print(f"{'read-only reduction':52} {median_interval(readings):8.2f} GB/s")
    for name in sorted(rates, key=lambda name: -median_interval(shares[name]).median):
        rate, share = median_interval(rates[name]), median_interval(shares[name])
        print(f"{name:52} {rate:8.2f} GB/s   of the reading {share:.2f}")


if __name__ == "__main__":
    main()
