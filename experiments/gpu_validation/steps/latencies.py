"""vAttention's Tables 3 and 9: what a call of the driver costs, and how fast it allocates."""

from kvarena.experiments.gpu_validation.record import Values
from kvarena.experiments.gpu_validation.step import Context
from kvarena.experiments.gpu_validation.steps.experiment_run import files_of, finished, medians

# experiment -> overrides that keep it short on a GPU, and shorter in a rehearsal; the quantity that is shown
_RUNS: dict[str, tuple[dict[str, list[str]], str]] = {
    "vmm_api_latency": (
        {
            "cuda": ["params.mapped=[100,1000,10000]", "params.created=[100,1000]", "params.rounds=10",
                     "params.calls=16"],
            "cpu": [
                "params.page_groups=[64KB]", "params.mapped=[10]", "params.created=[10]", "params.runs=[1]",
                "params.rounds=6", "params.calls=2",
            ],
        },
        "api_latency",
    ),
    "allocation_bandwidth": (
        {"cuda": ["params.rounds=8"], "cpu": ["params.page_groups=[64KB]", "params.pool=1MB", "params.rounds=6"]},
        "allocation_bandwidth",
    ),
}  # fmt: skip


def cases(device: str) -> list[str]:
    """The experiments."""
    return list(_RUNS)


def uses(case: str) -> list[str]:
    """The experiment."""
    return files_of(case)


def run(case: str, context: Context) -> Values:
    """Run one and show its headline."""
    overrides, quantity = _RUNS[case]
    return medians(finished(case, overrides[context.device], context), quantity)
