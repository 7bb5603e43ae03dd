"""A kernel over an allocator's memory, with nothing scheduled: what experiments compare that measure kernels alone."""

from dataclasses import fields
from typing import Any

from kvarena.allocators.options import with_options
from kvarena.allocators.registry import preset
from kvarena.harness.config import load, typed
from kvarena.harness.model.config import ModelConfig
from kvarena.harness.model.presets import preset_names
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System
from kvarena.harness.scheduler.vllm import VllmConfig
from kvarena.kernels.config import KernelConfig
from kvarena.kernels.registry import kernel_spec, pairing

HEADS = ("name", "num_heads", "num_kv_heads", "head_size", "dtype", "seed")  # all that a kernel sees of a model


def kernel_over(allocator: Any, kernel: str, variant: str | None = None) -> System:
    """A kernel over an allocator as a system, so that its rows are named like any other's. Its scheduler is idle."""
    scheduler = typed(VllmConfig, load("scheduler", "vllm"), "scheduler")
    told = pairing(kernel_spec(kernel))
    return System(f"{allocator.name}-{kernel}", allocator, KernelConfig(kernel), scheduler, told, variant)


def allocator_named(name: str, **wanted: object) -> Any:
    """An allocator's options, with those of `wanted` that it has."""
    return with_options(preset(name), **wanted)


def unread_of_model(run: Run[object], *read: str) -> dict[str, str]:
    """Keys of the model that kernels measured alone do not read, beside `read`; what a checkpoint is read for."""
    seen = {*HEADS, *read, *(() if run.model.name in preset_names() else ("checkpoint",))}
    instead = f"kernels are measured alone, over a model's heads: {', '.join(f'model.{key}' for key in HEADS[1:])}"
    return {f"model.{field.name}": instead for field in fields(ModelConfig) if field.name not in seen}
