"""A kernel over an allocator's memory, with nothing scheduled: what experiments compare that measure kernels alone."""

from collections.abc import Sequence
from dataclasses import fields

from kvarena.allocators.options import with_options
from kvarena.allocators.registry import preset
from kvarena.errors import UserError
from kvarena.experiments.kit.attention_time import USUAL_BLOCK
from kvarena.experiments.kit.block_sweep import check_block_sizes
from kvarena.harness.config import load, typed
from kvarena.harness.model.config import ModelConfig
from kvarena.harness.model.presets import preset_names
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import Options, System
from kvarena.harness.scheduler.vllm import VllmConfig
from kvarena.kernels.catalogue import CATALOGUE
from kvarena.kernels.config import KernelConfig
from kvarena.kernels.layout import Layout
from kvarena.kernels.registry import fits, kernel_spec, missing, pairing

HEADS = ("name", "num_heads", "num_kv_heads", "head_size", "dtype", "seed")  # all that a kernel sees of a model


def kernel_over(allocator: Options, kernel: str, variant: str | None = None) -> System:
    """A kernel over an allocator as a system, so that its rows are named like any other's. Its scheduler is idle."""
    scheduler = typed(VllmConfig, load("scheduler", "vllm"), "scheduler")
    told = pairing(kernel_spec(kernel))
    return System(f"{allocator.name}-{kernel}", allocator, KernelConfig(kernel), scheduler, told, variant)


def allocator_named(name: str, **wanted: object) -> Options:
    """An allocator's options, with those of `wanted` that it has."""
    options: Options = with_options(preset(name), **wanted)
    return options


def unread_of_model(run: Run[object], *read: str) -> dict[str, str]:
    """Keys of the model that kernels measured alone do not read, beside `read`; what a checkpoint is read for."""
    seen = {*HEADS, *read, *(() if run.model.name in preset_names() else ("checkpoint",))}
    instead = f"kernels are measured alone, over a model's heads: {', '.join(f'model.{key}' for key in HEADS[1:])}"
    return {f"model.{field.name}": instead for field in fields(ModelConfig) if field.name not in seen}


def misfit(run: Run[object], kernel: str, layout: Layout, block_size: int | None = None) -> str | None:
    """Why a kernel cannot read the model's heads here, if that is so."""
    model = run.model
    return fits(kernel_spec(kernel), layout, run.device.kind, model.dtype, model.head_size, block_size)


def kernels_here(run: Run[object], asked: Sequence[str] | None, *layouts: Layout) -> list[str]:
    """Those that are asked for, or all that are installed and read one of the layouts, of any block size.

    Raises UserError where one that is asked for does not.
    """

    def reason(kernel: str) -> str | None:
        why = [misfit(run, kernel, layout) for layout in layouts]
        return missing(kernel_spec(kernel)) or (None if None in why else why[0])

    for kernel in asked or ():
        if why := reason(kernel):
            raise UserError(f"params.kernels: {kernel}: {why}")
    return list(asked) if asked is not None else [name for name in CATALOGUE if reason(name) is None]


def check_table_sizes(sizes: Sequence[int], longest: int) -> None:
    """Raises UserError for sizes of blocks that do not divide rows of so many tokens, or none to compare them with."""
    check_block_sizes(sizes)
    odd = [size for size in sizes if size & (size - 1) or size > longest]
    if odd or USUAL_BLOCK not in sizes:
        raise UserError(
            f"params.block_sizes={list(sizes)}: powers of two, {USUAL_BLOCK} among them, none longer than the longest "
            f"context, {longest}"
        )
