"""Mapping beside the forward pass, and on its critical path (vAttention Fig 12)."""

from kvarena.experiments.gpu_validation.record import Values
from kvarena.experiments.gpu_validation.step import Context
from kvarena.experiments.gpu_validation.steps.experiment_run import finished, medians

EXPERIMENT = "allocation_overlap"
_SHORT = {
    "cuda": ["params.iterations=200", "params.rounds=2"],
    "cpu": ["params.iterations=40", "params.rounds=1"],
}


def cases(device: str) -> list[str]:
    """The experiment, by the profile of its device but shorter."""
    return [EXPERIMENT]


def run(case: str, context: Context) -> Values:
    """Run it."""
    return medians(finished(EXPERIMENT, _SHORT[context.device], context), "hidden_share")
