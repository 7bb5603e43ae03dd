"""Requests at once by the size of an allocation unit, in tokens: PagedAttention's blocks and vAttention's page-groups.

A block holds as many tokens as it says. A page-group backs one tensor of one layer (with tensor slicing, of all), so
the tokens that it holds follow from the model: 2 MB are 205 tokens of OPT-13B, sliced 5. What counts for memory is that
number, wherever it comes from; what differs is how often a unit is given, and what that costs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import pandas as pd

from kvarena.allocators.options import option, unit_option
from kvarena.allocators.usage import paper_vllm_rollup
from kvarena.allocators.vattention.page_groups import checked_page_group, row_geometries
from kvarena.errors import UserError
from kvarena.experiments.kit.cells import Cell, run_cells
from kvarena.experiments.kit.panels import Panel, curves, drawn
from kvarena.experiments.kit.quantities import Quantity, rows
from kvarena.experiments.kit.reads import reads
from kvarena.experiments.kit.replay import Replayer, workload_of
from kvarena.experiments.kit.seeds import seeds_of, unread_seeds
from kvarena.experiments.kit.windows import window_of
from kvarena.harness.record.record import Frames, Measured, Recorder
from kvarena.harness.record.summary import SummaryRow
from kvarena.harness.record.time_averages import Average, averages, shares, usage_of, window
from kvarena.harness.requests.workload import Workload
from kvarena.harness.run.published import named
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System

HEADLINE = "mean_batched_requests_vs_tokens_per_unit"
READS = reads()
ASSUMED = (
    "A step takes as long whatever the unit: what kernels lose with small blocks is not in the engine's constants."
)
QUANTITIES = [
    Quantity(HEADLINE, "requests", "batch"),
    Quantity("share_of_kv_memory_vs_tokens_per_unit:last_block_waste", "%", "partly_filled"),
    Quantity("units_per_step_vs_tokens_per_unit", "count", "units_per_step"),  # mapped, unmapped; blocks need no action
    Quantity("stall_share_of_time_vs_tokens_per_unit", "%", "stall_share"),
    Quantity("output_tokens_per_s_vs_tokens_per_unit", "tok/s", "tokens_per_s"),
]


@dataclass
class Params:
    """`params.*` of conf/experiment/granularity.yaml; null there means: by the profile."""

    block_sizes: list[int] = field(default_factory=list)  # of systems with allocator `paged`
    page_groups: list[str] = field(default_factory=list)  # of those with `vattention`
    sliced_page_groups: list[str] = field(default_factory=list)  # and with its tensor slicing
    seeds: list[int] = field(default_factory=list)  # at least 6 give a 95 % interval
    window_s: list[float] | None = None  # null: the steps that leave someone waiting
    pool_bytes: int | None = None


def unread(run: Run[Params]) -> dict[str, str]:
    """Keys that this run does not read, and what to write instead."""
    unused = {
        **unread_seeds(run),
        "allocator.block_size": "params.block_sizes=[...] are the block sizes",
        "allocator.page_group": "params.page_groups=[...] and params.sliced_page_groups=[...] are the page-groups",
    }
    read = {_units_of(system) for system in run.systems}
    for key in {"block_sizes", "page_groups", "sliced_page_groups"} - read:
        unused[f"params.{key}"] = f"no system of this run has such units: {', '.join(s.name for s in run.systems)}"
    return unused


def measure(run: Run[Params], recorder: Recorder) -> Measured:
    """Serve one overloaded trace with every unit of every system."""
    seeds = seeds_of(run)
    variants = list(_variants(run))
    replayer, workloads = Replayer(run), {seed: workload_of(run, seed=seed) for seed in seeds}
    cells = [
        Cell(f"{seed}-{system.name}-{tokens:g}", partial(_cell, run, replayer, system, workload),
             {"tokens": tokens, "seed": seed})
        for seed, workload in workloads.items() for system, tokens in variants
    ]  # fmt: skip
    notes = {"workload": workloads[seeds[-1]].provenance, "seeds": seeds, "assumed": ASSUMED}
    return Measured(run_cells(run.experiment, recorder, cells), notes)


def _units_of(system: System) -> str | None:
    """The key of `params` that has the system's units; None where it has none to change."""
    unit = unit_option(system.allocator)
    if unit is None:
        return None
    return f"sliced_{unit}s" if option(system.allocator, "tensor_slicing") else f"{unit}s"


def _variants(run: Run[Params]) -> Iterator[tuple[System, float]]:
    """Every system with each of its units, and the tokens that one holds."""
    layout = run.model.shard().kv_layout()
    for system in run.systems:
        key, allocator = _units_of(system), system.allocator
        if key is None:
            raise UserError(f"systems: {system.name} has no unit to change; those with blocks or page-groups have")
        units = getattr(run.params, key)
        if not units or len(set(units)) < len(units):
            raise UserError(f"params.{key}={units}: {system.name} needs at least one unit, and none twice")
        for unit in units:
            if key == "block_sizes":
                yield replace(system, allocator=replace(allocator, block_size=unit)), float(unit)
            else:
                geometry = row_geometries(layout, checked_page_group(unit), key == "sliced_page_groups")[0]
                tokens = geometry.page_group / geometry.token_stride
                yield replace(system, allocator=replace(allocator, page_group=unit)), tokens


def _cell(run: Run[Params], replayer: Replayer, system: System, workload: Workload) -> Frames:
    steps = window(replayer.serve(system, workload).steps, window_of(run, workload, run.params.window_s))
    means = averages(steps)
    mean = means[means.average == Average.OVER_ITERATIONS].iloc[0]
    point = {
        "system": system.name,
        "batch": mean.batch,
        "partly_filled": shares(paper_vllm_rollup(usage_of(mean)))["last_block_waste"],
        "units_per_step": (steps.actions + steps.ahead).sum() / steps.steps.sum(),
        "stall_share": 100 * steps.stall_ps.sum() / steps.duration_ps.sum(),
        "tokens_per_s": float((steps.output_tokens * steps.steps).sum()) / mean.seconds,
        "preempted": int(steps.preempted.sum()),
    }
    return {"points": pd.DataFrame([point])}


def summarize(run: Run[Params], frames: Frames) -> Iterator[SummaryRow]:
    """Every quantity of every unit, over the seeds."""
    points = frames["points"]
    for system in run.systems:
        own = points[points.system == system.name]
        for tokens in sorted(own.tokens.unique().tolist()):
            names = partial(named, run, system, x=tokens, assuming=ASSUMED)
            yield from rows(QUANTITIES, own[own.tokens == tokens], names)


PANELS = [
    Panel(curves, quantity.name, said, "tokens per unit", doubling=True)
    for quantity, said in zip(QUANTITIES, (
        "mean batched requests", "% of the pool in partly filled units", "driver calls per tensor and step",
    ), strict=False)
]  # fmt: skip
draw = partial(drawn, panels=PANELS)
