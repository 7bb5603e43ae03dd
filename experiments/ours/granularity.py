"""Requests at once by the size of an allocation unit, in tokens: PagedAttention's blocks and vAttention's page-groups.

A block holds as many tokens as it says. A page-group backs one tensor of one layer (with tensor slicing, of all), so
the tokens that it holds follow from the model: 2 MB are 205 tokens of OPT-13B, sliced 5. What counts for memory is that
number, wherever it comes from; what differs is how often a unit is given, and what that costs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvarena.allocators.options import option, unit_option
from kvarena.allocators.usage import paper_vllm_rollup
from kvarena.allocators.vattention.page_groups import checked_page_group, row_geometries
from kvarena.errors import UserError
from kvarena.experiments.kit import plots
from kvarena.experiments.kit.reads import reads
from kvarena.experiments.kit.replay import Replayer, workload_of
from kvarena.experiments.kit.seeds import seeds_of, unread_seeds
from kvarena.harness.record.progress import Progress
from kvarena.harness.record.record import Frames, Measured, Recorder
from kvarena.harness.record.statistics import median_interval
from kvarena.harness.record.summary import SummaryRow, frame, row
from kvarena.harness.record.time_averages import Average, averages, shares, usage_of, window
from kvarena.harness.requests.workload import Workload
from kvarena.harness.run.published import named
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System

NAME = "granularity"
HEADLINE = "mean_batched_requests_vs_tokens_per_unit"
READS = reads()
ASSUMED = (
    "A step takes as long whatever the unit: what kernels lose with small blocks is not in the engine's constants."
)
QUANTITIES = {
    "batch": ("mean_batched_requests", "requests"),
    "partly_filled": ("share_of_kv_memory:last_block_waste", "%"),
    "units_per_step": ("units_per_step", "count"),  # mapped and unmapped; blocks need no action
    "stall_share": ("stall_share_of_time", "%"),
    "tokens_per_s": ("output_tokens_per_s", "tok/s"),
}


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
    replayer, cells = Replayer(run), []
    with Progress(NAME, len(variants) * len(seeds)) as progress:
        for seed in seeds:
            workload = workload_of(run, seed=seed)
            for system, tokens in variants:
                progress.stage(f"seed {seed}, {system.name}, {tokens:g} tokens")
                measure = partial(_cell, run, replayer, system, workload)
                cell = recorder.cell(f"{seed}-{system.name}-{tokens:g}", measure)
                cells.append(cell["points"].assign(tokens=tokens, seed=seed))
                progress.advance()
    points = pd.concat(cells, ignore_index=True)
    return Measured({"points": points}, {"workload": workload.provenance, "seeds": seeds, "assumed": ASSUMED})


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
    rows = window(replayer.serve(system, workload).steps, run.params.window_s)
    means = averages(rows)
    mean = means[means.average == Average.OVER_ITERATIONS].iloc[0]
    point = {
        "system": system.name,
        "batch": mean.batch,
        "partly_filled": shares(paper_vllm_rollup(usage_of(mean)))["last_block_waste"],
        "units_per_step": (rows.actions + rows.ahead).sum() / rows.steps.sum(),
        "stall_share": 100 * rows.stall_ps.sum() / rows.duration_ps.sum(),
        "tokens_per_s": float((rows.output_tokens * rows.steps).sum()) / mean.seconds,
        "preempted": int(rows.preempted.sum()),
    }
    return {"points": pd.DataFrame([point])}


def summarize(run: Run[Params], frames: Frames) -> pd.DataFrame:
    """Every quantity of every unit, over the seeds."""
    return frame(_summary(run, frames["points"]))


def _summary(run: Run[Params], points: pd.DataFrame) -> Iterator[SummaryRow]:
    for system in run.systems:
        own = points[points.system == system.name]
        for tokens in sorted(own.tokens.unique().tolist()):
            rows = own[own.tokens == tokens]
            for column, (quantity, unit) in QUANTITIES.items():
                name, _, kind = quantity.partition(":")
                full = f"{name}_vs_tokens_per_unit" + (f":{kind}" if kind else "")
                names = named(run, system, x=tokens, assuming=ASSUMED)
                yield row(median_interval(rows[column]), quantity=full, unit=unit, **names)


def draw(summary: pd.DataFrame) -> Figure:
    """Requests at once, memory in partly filled units, and driver calls, over tokens per unit."""
    device = f"{summary.setup.iloc[0]}; {summary.clock.iloc[0]}"
    figure, axes = plots.canvas(1, 3, width=5)
    for axis, quantity, label in zip(
        axes,
        (HEADLINE, "share_of_kv_memory_vs_tokens_per_unit:last_block_waste", "units_per_step_vs_tokens_per_unit"),
        ("mean batched requests", "% of the pool in partly filled units", "driver calls per tensor and step"),
        strict=True,
    ):
        _lines(axis, summary[summary.quantity == quantity])
        axis.set(xlabel="tokens per unit", ylabel=label, ylim=(0, None))
        axis.set_title(device, fontsize=9)
    axes[0].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    return figure


def _lines(axis: Axes, rows: pd.DataFrame) -> None:
    plots.lines(axis, rows.assign(shown=rows.label.map(plots.shown_names(rows))), "shown")
    axis.set_xscale("log", base=2)
