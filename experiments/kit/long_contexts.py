"""vAttention's replays of long prompts: its models with stretched contexts, its share of each device, its requests."""

from dataclasses import dataclass, field, replace
from typing import TypeVar

from kvarena.experiments.kit.published_models import runs_by_model, unread_models
from kvarena.experiments.kit.reads import reads
from kvarena.harness.modelled.kv_pool import kv_pool_bytes
from kvarena.harness.run.run import Run

READS = reads()
MADE_UP = "lengths are made up: trace.path names the published requests"


@dataclass
class LongContexts:
    """Keys of `params` that such replays have."""

    models: dict[str, int] = field(default_factory=dict)  # name -> tensor-parallel degree
    context: int | None = None  # tokens of the longest sequence; null: the model's
    memory_share: float = 0.9  # of a device's memory, for weights, activations and K/V
    pool_bytes: int | None = None  # of K/V on one device; null: what memory_share leaves


L = TypeVar("L", bound=LongContexts)


def runs_of_long_contexts(run: Run[L]) -> list[Run[L]]:
    """One run per model, the pool sized as the engine sizes it: `params.memory_share` of a device, less the rest."""
    return [_with_pool(one) for one in runs_by_model(run, run.params.models)]


def _with_pool(run: Run[L]) -> Run[L]:
    if run.clock == "measured" or run.params.pool_bytes is not None:
        return run
    pool = kv_pool_bytes(run.device, run.model, utilization=run.params.memory_share) // run.model.tp
    return replace(run, params=replace(run.params, pool_bytes=pool))


def unread_of_long_contexts(run: Run[LongContexts]) -> dict[str, str]:
    """Keys that such a run does not read, and what to write instead."""
    keys = unread_models(run, run.params.models)
    if run.clock == "measured":
        keys["params.memory_share"] = "params.pool_bytes sets the pool under clock=measured"
        keys["params.context"] = "no position is stretched under clock=measured; trace.max_tokens bounds a sequence"
    elif run.params.pool_bytes is not None:
        keys["params.memory_share"] = "params.pool_bytes sets the pool"
    return keys


def assumed_lengths(run: Run[object]) -> str:
    """What rows of the run rest on where nobody's requests were served, in words."""
    return MADE_UP if run.trace.path is None and run.trace.table is None else ""
