"""Every kernel against float64, on random inputs that are new every time; the seed is in the record."""

import math
import secrets
from collections.abc import Sequence

import torch

from kvarena.allocators.sizes import KB, MB
from kvarena.experiments.gpu_validation.record import FailedError, NotRunError, Values
from kvarena.experiments.gpu_validation.step import Context
from kvarena.kernels.catalogue import CATALOGUE
from kvarena.kernels.kernel import AttentionKernel
from kvarena.kernels.layout import Layout
from kvarena.kernels.random_batch import Batch, Shapes, random_batch
from kvarena.kernels.reference import reference_attention
from kvarena.kernels.registry import fits, get_kernel, missing

# Llama-3-8B's heads in bfloat16, Yi-6B's in float16; on the CPU smaller ones.
SHAPES = {
    "cuda": (
        Shapes(heads=8, group=4, size=128, dtype=torch.bfloat16, device="cuda"),
        Shapes(heads=4, group=8, size=128, dtype=torch.float16, device="cuda"),
    ),
    "cpu": (Shapes(heads=2, group=4, size=64), Shapes(heads=4, group=1, size=32)),
}
LONGEST = {"cuda": 4000, "cpu": 300}
PAGE_GROUP = {"cuda": 2 * MB, "cpu": 64 * KB}  # of the steps that map memory for a kernel
MOST_QUERIES = 200  # of a long sequence: the reference works in float64, on the CPU
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # of the largest output
ARRANGEMENTS = {"rows": None, "blocks in order": False, "blocks shuffled": True}
SLOW_TO_BUILD = "flashinfer"  # compiles for minutes where no one has brought its kernels: last
FILLER = 1e4  # finite: what a kernel weighs with 0 may not be a NaN


def kernel_names(device: str) -> list[str]:
    """Kernels of a device; the one that may take minutes to build last."""
    names = [name for name, (spec, *_) in CATALOGUE.items() if device in spec.devices and not spec.needs_cxx]
    return sorted(names, key=lambda name: name == SLOW_TO_BUILD)


def cases(device: str) -> list[str]:
    """Kernel by arrangement, as far as it reads it."""
    return [
        f"{name}, {arrangement}"
        for name in kernel_names(device)
        for arrangement in ARRANGEMENTS
        if _layout(arrangement) in CATALOGUE[name][0].layouts
    ]


def uses(case: str) -> list[str]:
    """The kernel."""
    return [CATALOGUE[case.partition(", ")[0]][1]]


def run(case: str, context: Context) -> Values:
    """Decode and prefill on every shape; the largest gap to float64, as a share of the largest output."""
    name, arrangement = case.split(", ")
    kernel, seed = kernel_to_run(name, context), secrets.randbelow(2**31)
    values: Values = {"seed": seed}
    for shapes in SHAPES[context.device]:
        for phase in ("decode", "prefill"):
            batch = fresh_batch(shapes, arrangement, phase == "prefill", seed, context, name)
            values[f"gap, {phase}, {str(shapes.dtype).removeprefix('torch.')}"] = check(kernel, batch)
    values["past the length"] = "weighed with 0" if _weighs_the_rest(kernel, name, arrangement, context) else "ignored"
    return values


def kernel_to_run(name: str, context: Context) -> AttentionKernel:
    """The kernel. Raises NotRunError that says what it lacks here."""
    spec = CATALOGUE[name][0]
    if reason := missing(spec):
        raise NotRunError(reason)
    return get_kernel(name)


def fresh_batch(
    shapes: Shapes, arrangement: str, prefill: bool, seed: int, context: Context, name: str, filler: float = FILLER
) -> Batch:
    """Random lengths and values; blocks of 16, or of the smallest size from there on that the kernel takes."""
    spec = CATALOGUE[name][0]
    block = None if _layout(arrangement) is Layout.CONTIGUOUS else min({s for s in spec.block_sizes or {16} if s >= 16})
    dtype = str(shapes.dtype).removeprefix("torch.")
    if reason := fits(spec, _layout(arrangement), context.device, dtype, shapes.size, block):
        raise NotRunError(reason)
    draw = torch.Generator().manual_seed(seed)
    lengths = [1, 256, *torch.randint(2, LONGEST[context.device], (4,), generator=draw).tolist()]
    counts = [1 + int(torch.randint(min(length, MOST_QUERIES), (1,), generator=draw)) for length in lengths]
    queries = [1, 256, *counts[2:]] if prefill else None  # the second is a whole prompt
    order = {"shuffled": ARRANGEMENTS[arrangement]} if block else {"padding": 64}
    return random_batch(shapes, lengths, queries, block, seed=seed, filler=filler, **order)


def check(kernel: AttentionKernel, batch: Batch) -> float:
    """Largest gap to float64, as a share of the largest output. Raises FailedError where it is too large."""
    out = attended(kernel, batch)
    expected = reference_attention(*batch)
    gap = float((out.double().cpu() - expected).abs().max() / expected.abs().max())
    if not gap <= TOLERANCE[out.dtype]:
        raise FailedError(f"off by {gap:.2e} of the largest output; {TOLERANCE[out.dtype]:.0e} is allowed")
    return float(f"{gap:.2e}")


def attended(kernel: AttentionKernel, batch: Batch) -> torch.Tensor:
    """What the kernel writes; every element of the output starts as NaN."""
    out = torch.full_like(batch.q, math.nan)
    (kernel.decode if batch.view.is_decode else kernel.prefill)(*batch, out)
    return out


def _weighs_the_rest(kernel: AttentionKernel, name: str, arrangement: str, context: Context) -> bool:
    """Whether a NaN past a sequence's length reaches its output."""
    shapes: Sequence[Shapes] = SHAPES[context.device]
    batch = fresh_batch(shapes[0], arrangement, False, 1, context, name, filler=math.nan)
    return bool(attended(kernel, batch).isnan().any())


def _layout(arrangement: str) -> Layout:
    return Layout.CONTIGUOUS if ARRANGEMENTS[arrangement] is None else Layout.PAGED
