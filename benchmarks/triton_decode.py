"""Which tiles, stages and splits suit our GPU kernel best: GB/s of K/V that it reads, over a plain reduction's.

    ./run.sh benchmark triton_decode [--batch 32 --context 16384]

The shapes are those that `kernels/triton_launch.py` may choose from, timed as experiment=attention_kernel times kernels
(which says how near all of them come to what the memory gives). Goal: 0.7 of FA3 at batch 32, context 16384.
"""

import argparse
import itertools
import sys

import torch

from kvarena.experiments.kit.attention_time import USUAL_BLOCK, WorkingSet, seconds_per_call
from kvarena.harness.measured.calibration import StreamingRead
from kvarena.harness.model import load_preset
from kvarena.harness.record.statistics import median_interval
from kvarena.kernels.arrangement import Arrangement
from kvarena.kernels.kernel import AttentionKernel

PLACES = {
    "rows": Arrangement(None),
    "ordered blocks": Arrangement(USUAL_BLOCK),
    "scattered blocks": Arrangement(USUAL_BLOCK, scattered=True),
}


def shapes() -> dict[str, AttentionKernel]:
    """Our kernel, with shapes of one program and tokens of one split."""
    from kvarena.kernels.triton_attention import TritonAttention
    from kvarena.kernels.triton_launch import Tiles

    return {
        f"tile {tile}, warps {warps}, stages {stages}, split {split}": TritonAttention(
            Tiles(16, tile, warps, stages), split
        )
        for tile, warps, stages, split in itertools.product((32, 64, 128), (2, 4), (2, 3, 5), (512, 1024, 4096))
        if tile * stages <= 384  # as much as a multiprocessor holds
    }


def main() -> None:
    """Measure in turns, and print medians with 95 % intervals, fastest first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA GPU")
    device = torch.device("cuda")
    memory = WorkingSet(load_preset("llama-3-8b", dtype="bfloat16"), given.batch, given.context, 1 << 30, device)
    read, timers = StreamingRead(device), {}
    for (name, kernel), (place, arrangement) in itertools.product(shapes().items(), PLACES.items()):
        try:
            timers[f"{name}, {place}"] = seconds_per_call(memory.calls(kernel, arrangement), device, in_graph=True)
        except Exception as error:  # a shape that the compiler refuses
            print(f"{name}, {place}: {type(error).__name__}: {str(error).splitlines()[0]}")
    shares: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(given.rounds):
        limit = read.gb_per_s(repetitions=1)
        for name, timer in timers.items():
            shares[name].append(memory.bytes_per_call / timer() / 1e9 / limit)
    print(f"{torch.cuda.get_device_name()}, batch {given.batch}, context {given.context}, n = {given.rounds}")
    for name in sorted(shares, key=lambda name: -median_interval(shares[name]).median):
        print(f"{name:52} {median_interval(shares[name]):.2f} of the reading")


if __name__ == "__main__":
    main()
