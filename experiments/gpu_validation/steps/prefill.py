"""Prefill throughput with one kernel over the memory of three allocators (vAttention Figs 2 and 7)."""

from kvarena.experiments.gpu_validation.record import NotRunError, Values
from kvarena.experiments.gpu_validation.step import Context
from kvarena.experiments.gpu_validation.steps.decode import ALLOCATORS, KERNELS
from kvarena.experiments.gpu_validation.steps.experiment_run import files_of, finished, medians
from kvarena.kernels.catalogue import CATALOGUE
from kvarena.kernels.registry import kernel_spec, missing

EXPERIMENT = "prefill_throughput"
_SHORT = {
    "cuda": ["model=yi-6b", "params.contexts=[1024,4096,16384]", "params.rounds=6"],
    "cpu": ["model=tiny-llama", "params.contexts=[64]", "params.rounds=6", "params.pool_bytes=16777216"],
}


def cases(device: str) -> list[str]:
    """Every kernel."""
    return list(KERNELS[device])


def uses(case: str) -> list[str]:
    """The experiment and the kernel."""
    return [*files_of(EXPERIMENT), CATALOGUE[case][1]]


def run(case: str, context: Context) -> Values:
    """Tokens/s by allocator and prompt length."""
    if reason := missing(kernel_spec(case)):
        raise NotRunError(reason)
    systems = f"systems=[{','.join(f'{allocator}-{case}' for allocator in ALLOCATORS)}]"
    folder = finished(EXPERIMENT, [systems, *_SHORT[context.device]], context, f"{EXPERIMENT}_{case}")
    return medians(folder, "prefill_throughput_vs_context")
