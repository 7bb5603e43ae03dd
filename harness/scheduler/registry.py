"""Scheduling policies by name."""

from typing import Any

from kvarena.allocators.policy import Policy
from kvarena.allocators.registry import policy_class
from kvarena.errors import UserError
from kvarena.harness.scheduler.chunked_prefill import ChunkedPrefillConfig, ChunkedPrefillScheduler
from kvarena.harness.scheduler.fastertransformer import FasterTransformerConfig, FasterTransformerScheduler
from kvarena.harness.scheduler.orca import OrcaConfig, OrcaScheduler
from kvarena.harness.scheduler.scheduler import Scheduler
from kvarena.harness.scheduler.vllm import VllmConfig, VllmScheduler

# name -> dataclass of its options, class; vllm_v1 and sarathi are presets of chunked prefill (conf/scheduler/)
_SCHEDULERS: dict[str, tuple[type[Any], type[Any]]] = {
    "vllm": (VllmConfig, VllmScheduler),
    "orca": (OrcaConfig, OrcaScheduler),
    "fastertransformer": (FasterTransformerConfig, FasterTransformerScheduler),
    "chunked_prefill": (ChunkedPrefillConfig, ChunkedPrefillScheduler),
    "sarathi": (ChunkedPrefillConfig, ChunkedPrefillScheduler),
    "vllm_v1": (ChunkedPrefillConfig, ChunkedPrefillScheduler),
}

SCHEDULERS = tuple(sorted(_SCHEDULERS))


def config_class(name: str) -> type[Any]:
    """The dataclass of a policy's options. Raises UserError with the names that exist."""
    return _look_up(name)[0]


def check_pair(scheduler: str, allocator: str) -> None:
    """Raises UserError for an allocator that the scheduler cannot drive."""
    if _look_up(scheduler)[1].pads and not policy_class(allocator).pads:
        raise UserError(
            f"scheduler={scheduler}: its batches run to the end together, and {allocator} does not pad rows to it; "
            "allocator=fastertransformer does"
        )


def make_scheduler(config: Any, policy: Policy, max_tokens: int) -> Scheduler:
    """The scheduler that `config` describes. Raises UserError for an unknown name or an option out of range."""
    scheduler: Scheduler = _look_up(config.name)[1](policy, config, max_tokens)
    return scheduler


def _look_up(name: str) -> tuple[type[Any], type[Any]]:
    if name not in _SCHEDULERS:
        raise UserError(f"scheduler={name}: no such scheduler. There are: {', '.join(SCHEDULERS)}")
    return _SCHEDULERS[name]
