"""vAttention's replays of long prompts: its models with stretched contexts, its share of each device, its requests."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from kvarena.experiments.published_models import runs_by_model
from kvarena.experiments.replay import columns
from kvarena.harness.kv_pool import kv_pool_bytes
from kvarena.harness.run import Run
from kvarena.harness.systems import System

CONDITION = "lengths are made up unless trace.path names the published requests: without it rows are conditional"


def runs_of_long_contexts(run: Run) -> list[Run]:
    """One run per model, the pool sized as the engine sizes it: `params.memory_share` of a device, less the rest."""
    return [_with_pool(one) for one in runs_by_model(run)]


def _with_pool(run: Run) -> Run:
    if run.clock == "measured" or run.params.pool_bytes is not None:
        return run
    pool = kv_pool_bytes(run.device, run.model, utilization=run.params.memory_share) // run.model.tp
    return replace(run, params=replace(run.params, pool_bytes=pool))


def by_system(run: Run, experiment: str) -> Iterator[tuple[System, dict[str, Any]]]:
    """Every system of the run, with what its summary rows share."""
    for system in run.systems:
        yield system, {"experiment": experiment, "panel": run.shown_model, **columns(run, system)}


def evidence(run: Run, figure: str, shared: dict[str, Any]) -> str:
    """What kind of evidence a row is; `shared` are its columns."""
    if run.clock == "measured":
        return "measured"
    if not run.trace.path:
        return "conditional"
    return str(run.engine.evidence(figure, shared["panel"], shared["system"], shared.get("x")))
