"""Shapes of one program of our decode kernel, at the batch and context that the goals are stated for.

Those in use are reckoned from compiled code (`kernels/triton_launch.py`); `benchmarks/triton_decode.py` tries more.
"""

from functools import cache

import torch

from kvarena.experiments.command.compose import compose_run
from kvarena.experiments.gpu_validation.record import NotRunError, Values
from kvarena.experiments.gpu_validation.step import Context
from kvarena.experiments.gpu_validation.steps.sweep import GOAL
from kvarena.experiments.kit.attention_time import USUAL_BLOCK, WorkingSet, seconds_per_call
from kvarena.harness.measured.calibration import StreamingRead
from kvarena.harness.record.statistics import median_interval
from kvarena.kernels.arrangement import Arrangement

ROUNDS = 9
MODEL = ["model=llama-3-8b", "model.dtype=bfloat16"]  # its heads
WORKING_SET_BYTES = 1 << 30
# tokens of a tile, warps, stages, tokens of a split (0: as chosen by the call)
SHAPES = ((64, 4, 3, 0), (64, 4, 3, 512), (64, 4, 3, 2048), (64, 4, 4, 0), (64, 8, 3, 0), (128, 4, 2, 0),
          (128, 8, 3, 0), (32, 4, 5, 0))  # fmt: skip


def cases(device: str) -> list[str]:
    """One for each shape, the one in use first."""
    return [_named(*shape) for shape in SHAPES]


def uses(case: str) -> list[str]:
    """Our kernel, over the heads of a model."""
    return ["kvarena.kernels.triton_attention", "conf/model/llama-3-8b.yaml"]


def run(case: str, context: Context) -> Values:
    """Share of the reduction that the kernel reads, on rows and on shuffled blocks."""
    if not context.on_gpu:
        raise NotRunError("the kernel runs on a GPU")
    from kvarena.kernels.triton_attention import TritonAttention
    from kvarena.kernels.triton_launch import Tiles

    tile, warps, stages, split = next(shape for shape in SHAPES if _named(*shape) == case)
    kernel, device = TritonAttention(Tiles(16, tile, warps, stages), split or None), torch.device(context.device)
    memory, read = _memory(device)
    shares: Values = {}
    for name, where in (("rows", Arrangement(None)), ("shuffled blocks", Arrangement(USUAL_BLOCK, scattered=True))):
        timer = seconds_per_call(memory.calls(kernel, where), device, in_graph=True)
        taken = [memory.bytes_per_call / timer() / 1e9 / read.gb_per_s(repetitions=1) for _ in range(ROUNDS)]
        shares[f"{name} / read"] = f"{median_interval(taken):.3f}"
    return shares


@cache
def _memory(device: torch.device) -> tuple[WorkingSet, StreamingRead]:
    """What all cases of this process read: drawing it and its float64 take longer than any of them."""
    model = compose_run("experiment=attention_kernel", *MODEL, "device=cuda").model
    return WorkingSet(model, *GOAL, WORKING_SET_BYTES, device), StreamingRead(device)


def _named(tile: int, warps: int, stages: int, split: int) -> str:
    return f"tile {tile}, warps {warps}, stages {stages}, split {split or 'as chosen'}"
