"""Decode throughput with one kernel over the memory of three allocators (vAttention Fig 8).

With CUDA graphs first: what is measured is the device. Launched one by one, as the papers' engines did, hundreds of
short kernels a step wait for Python: those cases say so in their name.
"""

from pathlib import Path

from kvarena.experiments.gpu_validation.record import NotRunError, Values
from kvarena.experiments.gpu_validation.step import Context
from kvarena.experiments.gpu_validation.steps.experiment_run import files_of, finished, medians
from kvarena.harness.record.statistics import median_interval
from kvarena.kernels.catalogue import CATALOGUE
from kvarena.kernels.registry import kernel_spec, missing

EXPERIMENT = "decode_throughput"
ALLOCATORS = ("static", "paged", "vattention")
KERNELS = {"cuda": ("fa3", "triton"), "cpu": ("numba",)}
GRAPHS, EAGER = "CUDA graphs", "eager, host-bound"
_SHORT = {
    "cuda": ["model=yi-6b", 'params.prompts=["16384"]', "params.max_tokens=18432", "params.warmup_steps=4",
             "params.rounds=7", "params.steps_per_round=10"],
    "cpu": ["model=tiny-llama", 'params.prompts=["40"]', "params.max_tokens=128", "params.warmup_steps=1",
            "params.rounds=6", "params.steps_per_round=2", "params.pool_bytes=16777216"],
}  # fmt: skip


def cases(device: str) -> list[str]:
    """Every kernel, at the papers' batch size and at the one that is hardest to keep busy; eager last."""
    if device == "cpu":
        return [f"numba, {how}, batch 2" for how in (GRAPHS, EAGER)]
    graphs = [f"{kernel}, {GRAPHS}, batch {batch}" for batch in (16, 1) for kernel in KERNELS[device]]
    return [*graphs, f"{KERNELS[device][0]}, {EAGER}, batch 16"]


def uses(case: str) -> list[str]:
    """The experiment and the kernel."""
    return [*files_of(EXPERIMENT), CATALOGUE[case.partition(", ")[0]][1]]


def run(case: str, context: Context) -> Values:
    """Tokens/s of each allocator, and over static's round by round."""
    kernel, rest = case.split(", ", 1)
    how, batch = rest.rsplit(", batch ", 1)
    if reason := missing(kernel_spec(kernel)):
        raise NotRunError(reason)
    systems = f"systems=[{','.join(f'{allocator}-{kernel}' for allocator in ALLOCATORS)}]"
    overrides = [systems, f"params.batch_sizes=[{batch}]", *_SHORT[context.device]]
    if how == GRAPHS and context.on_gpu:
        overrides.append("engine.cuda_graphs=true")
    kept_as = f"{EXPERIMENT}_{kernel}_batch_{batch}{'_graphs' * (how == GRAPHS)}"
    folder = finished(EXPERIMENT, overrides, context, kept_as)
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
