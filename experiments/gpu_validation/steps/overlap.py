"""Mapping beside the forward pass, and on its critical path (vAttention Fig 12).

Sixteen sequences that fill a page-group of 1024 tokens at eight-token distances: 16 events in 136 iterations, none of
them among the first. The steps are CUDA graphs, as in any engine of today: launched one by one, the host would be what
mapping competes with.
"""

from pathlib import Path

import pandas as pd

from kvarena.experiments.gpu_validation.record import FailedError, Values
from kvarena.experiments.gpu_validation.step import Context
from kvarena.experiments.gpu_validation.steps.experiment_run import files_of, finished, medians

EXPERIMENT = "allocation_overlap"
LEAST_EVENTS = 16
_SHORT = {
    "cuda": ["params.prompt_tokens=4980", "params.cohorts=16", "params.stagger=8", "params.iterations=136",
             "params.max_batch=16", "params.rounds=2", "engine.cuda_graphs=true"],
    "cpu": ["params.iterations=40", "params.rounds=1"],
}  # fmt: skip
_SHOWN = ("hidden_share", "wait_for_mapping", "added_latency_of_mapping", "critical_driver_calls")


def cases(device: str) -> list[str]:
    """The experiment, by the profile of its device but shorter."""
    return [EXPERIMENT]


def uses(case: str) -> list[str]:
    """The experiment and the kernel of its profile."""
    return [*files_of(EXPERIMENT), "kvarena.kernels.triton_attention"]


def run(case: str, context: Context) -> Values:
    """Run it. Raises FailedError where too few iterations mapped anything for the share to mean something."""
    folder = finished(EXPERIMENT, _SHORT[context.device], context)
    events = _events(folder)
    if context.on_gpu and events < LEAST_EVENTS:
        raise FailedError(f"only {events} iterations mapped anything; at least {LEAST_EVENTS} were meant")
    shown = {f"{quantity} {of}": value for quantity in _SHOWN for of, value in medians(folder, quantity).items()}
    return {"events": events, **shown}


def _events(folder: Path) -> int:
    """Iterations before which sync mapped, over all rounds."""
    steps = pd.read_parquet(folder / "iterations.parquet")
    return int((steps[steps.way == "sync"].actions > 0).sum())
