"""Requests at once by size of page-group (vAttention Fig 15): one trace, more of it than the server can take."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import pandas as pd

from kvarena.errors import UserError
from kvarena.experiments.kit.published_models import runs_by_model
from kvarena.experiments.kit.replay import Replayer, workload_of
from kvarena.experiments.vattention.mapped_system import on_gpus
from kvarena.experiments.vattention.page_group_kernels import Point
from kvarena.harness.modelled.kv_pool import kv_pool_bytes
from kvarena.harness.record.record import Frames
from kvarena.harness.record.time_averages import window
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System, alike, distinct


@dataclass
class Params:
    """`params.*` of conf/experiment/page_group_size.yaml; null there means: by the profile."""

    page_groups: list[str] = field(default_factory=list)  # of vattention: 64KB ...
    sliced_page_groups: list[str] = field(default_factory=list)  # and with its tensor slicing
    block_sizes: list[int] = field(default_factory=list)  # of paged, tokens
    seeds: list[int] = field(default_factory=list)  # of the trace; at least 6 give a 95 % interval
    pool_bytes: int | None = None  # null: what the model's GPUs leave, modelled clock
    gpus: dict[str, int] = field(default_factory=dict)  # modelled clock: model -> GPUs
    # Fig 14, measured clock
    kernels: list[str] = field(default_factory=list)
    compared: list[str] = field(default_factory=list)  # two page-groups, the smaller first
    prefill_contexts: list[int] = field(default_factory=list)  # tokens of one prompt
    decode_context: int = 0  # tokens of every sequence
    decode_batches: list[int] = field(default_factory=list)
    rounds: int = 0  # each in fresh memory

    def points(self) -> list[Point]:
        """Calls of Fig 14."""
        prefills = [Point("prefill", 1, context) for context in self.prefill_contexts]
        return prefills + [Point("decode", batch, self.decode_context) for batch in self.decode_batches]


MEMORY_UTILIZATION = 0.9  # of the paper's runs
_ROWS = 1024  # of the virtual tensors: no batch gets there
CHANGED = ("page_group", "tensor_slicing", "max_rows", "block_size")  # fields of allocators that the variants set


class Variant(NamedTuple):
    """A system with one unit of allocation."""

    unit: str  # as Fig 15 has it: 64KB ... 2MB; further `2MB sliced`, `blocks of 16`
    listed: System  # as the run lists it
    system: System  # as it runs

    @property
    def key(self) -> str:
        """Names its cells."""
        return f"{self.system.shown_allocator}-{self.system.kernel.name}".replace(" ", "-")


def variants(run: Run[Params]) -> list[Variant]:
    """Every system with each of its units, what comes twice once. Raises UserError for one without any, or for none."""
    found: list[Variant] = []
    for variant in (each for system in run.systems for each in _units_of(run, system)):
        if not any(alike(variant.system, other.system) for other in found):
            found.append(variant)
    if not found:
        raise UserError("params.page_groups, params.sliced_page_groups, params.block_sizes: name at least one unit")
    told = distinct(
        [variant.system for variant in found], by_kernel=bool(run.clock == "measured" or run.engine.attention)
    )
    return [variant._replace(system=system) for variant, system in zip(found, told, strict=True)]


def _units_of(run: Run[Params], system: System) -> Iterator[Variant]:
    params, own = run.params, {field.name for field in fields(system.allocator)}
    if {"page_group", "tensor_slicing"} <= own:
        for sliced, sizes in ((False, params.page_groups), (True, params.sliced_page_groups)):
            for size in sizes:
                unit = f"{size} sliced" if sliced else size
                name = f"{system.allocator.name}-{'sliced-' if sliced else ''}{size}"
                yield _variant(system, unit, name, page_group=size, tensor_slicing=sliced, max_rows=_ROWS)
    elif "block_size" in own:
        for tokens in params.block_sizes:
            yield _variant(system, f"blocks of {tokens}", f"{system.allocator.name} of {tokens}", block_size=tokens)
    else:
        raise UserError(f"systems: {system.name} has no unit to change; those with page-groups or blocks have")


def _variant(system: System, unit: str, name: str, **changes: object) -> Variant:
    return Variant(unit, system, replace(system, allocator=replace(system.allocator, **changes), variant=name))


def served(run: Run[Params]) -> list[Run[Params]]:
    """The run with each model of the figure; under the measured clock as it is."""
    return runs_by_model(run, run.params.gpus)


def measure(run: Run[Params], variant: Variant, seed: int) -> Frames:
    """The largest batch of one replay, and the mean one while someone waits."""
    replayer = Replayer(on_gpus(_with_pool(run), run.model.tp, run.context))
    steps = replayer.serve(variant.system, workload_of(run, seed=seed)).steps
    waiting = window(steps, None)
    mean = (waiting.requests * waiting.steps).sum() / waiting.steps.sum()
    point = {"system": variant.system.shown_allocator, "kernel": variant.system.kernel.name, "unit": variant.unit,
             "seed": seed, "max_batch": int(steps.requests.max()), "mean_batch": float(mean),
             "preempted": int(steps.preempted.sum())}  # fmt: skip
    return {"points": pd.DataFrame([point])}


def _with_pool(run: Run[Params]) -> Run[Params]:
    """The pool that the model's GPUs leave, unless the user says."""
    if run.clock == "measured" or run.params.pool_bytes is not None:
        return run
    pool = kv_pool_bytes(run.device, run.model, run.context, MEMORY_UTILIZATION) // run.model.tp
    return replace(run, params=replace(run.params, pool_bytes=pool))
