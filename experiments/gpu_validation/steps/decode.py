"""Decode throughput with one kernel over the memory of three allocators (vAttention Fig 8), with and without graphs."""

from pathlib import Path

from kvarena.experiments.gpu_validation.record import NotRunError, Values
from kvarena.experiments.gpu_validation.step import Context
from kvarena.experiments.gpu_validation.steps.experiment_run import finished, medians
from kvarena.harness.record.statistics import median_interval
from kvarena.kernels.registry import kernel_spec, missing

ALLOCATORS = ("static", "paged", "vattention")
KERNELS = {"cuda": ("triton", "fa3"), "cpu": ("numba",)}
_LISTS = {"cuda": "params.batch_sizes=[1,8,16]", "cpu": "params.batch_sizes=[1,2]"}
_SHORT = {
    "cuda": ["model=yi-6b", 'params.prompts=["16384"]', "params.max_tokens=18432", "params.warmup_steps=4",
             "params.rounds=7", "params.steps_per_round=10", "params.pool_bytes=21474836480"],
    "cpu": ["model=tiny-llama", 'params.prompts=["40"]', "params.max_tokens=128", "params.warmup_steps=1",
            "params.rounds=6", "params.steps_per_round=2", "params.pool_bytes=16777216"],
}  # fmt: skip


def cases(device: str) -> list[str]:
    """Every kernel, its steps launched one by one and as graphs."""
    return [f"{kernel}{how}" for how in ("", ", CUDA graphs") for kernel in KERNELS[device]]


def run(case: str, context: Context) -> Values:
    """Tokens/s of each allocator, and over static's round by round."""
    kernel, _, graphs = case.partition(", ")
    if reason := missing(kernel_spec(kernel)):
        raise NotRunError(reason)
    systems = f"systems=[{','.join(f'{allocator}-{kernel}' for allocator in ALLOCATORS)}]"
    overrides = [systems, _LISTS[context.device], *_SHORT[context.device]]
    name = f"decode_throughput_{kernel}"
    if graphs:
        overrides.append("++engine.cuda_graphs=true")
        name += "_graphs"
    folder = finished("decode_throughput", overrides, context, name)
    return {**over_static(folder), **medians(folder, "decode_throughput_vs_batch")}


def over_static(folder: Path) -> Values:
    """Median of each allocator's tokens/s over static's in the same round, with its 95 % interval."""
    import pandas as pd

    steps = pd.read_parquet(folder / "steps.parquet")
    steps["allocator"] = steps.system.str.split("-").str[0]
    found: Values = {}
    for batch, part in steps.groupby("batch"):
        seconds = part.pivot_table(index="round", columns="allocator", values="step_s", aggfunc="sum")
        for allocator in ALLOCATORS[1:]:
            ratio = median_interval(seconds["static"] / seconds[allocator])
            found[f"{allocator} over static, batch {batch}"] = f"{ratio:.3f}"
    return found
