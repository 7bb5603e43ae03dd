"""Prefill throughput (vAttention Figs 2 and 7)."""

from kvarena.experiments.gpu_validation.record import Values
from kvarena.experiments.gpu_validation.step import Context
from kvarena.experiments.gpu_validation.steps.experiment_run import finished, medians

EXPERIMENT = "prefill_throughput"


def cases(device: str) -> list[str]:
    """The experiment, by the profile of its device."""
    return [EXPERIMENT]


def run(case: str, context: Context) -> Values:
    """Run it."""
    return medians(finished(EXPERIMENT, [], context), "prefill_throughput_vs_context")
