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

from kvarena.allocators.page_groups import checked_page_group, row_geometries
from kvarena.allocators.usage import paper_vllm_rollup
from kvarena.errors import UserError
from kvarena.experiments import plots
from kvarena.experiments.averages import Average, averages, shares, usage_of, window
from kvarena.experiments.replay import Replayer, columns, panel_of, workload_of
from kvarena.harness.progress import Progress
from kvarena.harness.record import Frames, Outcome, Recorder
from kvarena.harness.run import Run
from kvarena.harness.statistics import median_interval
from kvarena.harness.summary import SummaryRow, frame, row
from kvarena.harness.systems import System
from kvarena.harness.workload import Workload

NAME = "granularity"
HEADLINE = "mean_batched_requests_vs_tokens_per_unit"
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


def run(run: Run, recorder: Recorder) -> Outcome:
    """Serve one overloaded trace with every unit of every system. Raises UserError for no seeds, or one twice."""
    params: Params = run.params
    if not params.seeds or len(set(params.seeds)) < len(params.seeds):
        raise UserError(f"params.seeds={params.seeds}: at least one seed, and none twice")
    variants = list(_variants(run))
    replayer, cells = Replayer(run), []
    with Progress(NAME, len(variants) * len(params.seeds)) as progress:
        for seed in params.seeds:
            workload = workload_of(run, seed=seed)
            for system, tokens in variants:
                progress.stage(f"seed {seed}, {system.name}, {tokens:g} tokens")
                measure = partial(_cell, run, replayer, system, workload)
                cell = recorder.cell(f"{seed}-{system.name}-{tokens:g}", measure)
                cells.append(cell["points"].assign(tokens=tokens, seed=seed))
                progress.advance()
    points = pd.concat(cells, ignore_index=True)
    summary = frame(_summary(run, points))
    notes = {"workload": workload.provenance, "seeds": params.seeds, "assumed": ASSUMED}
    return Outcome(summary, pd.DataFrame({"seed": []}), points, HEADLINE, draw(summary), notes)


def _variants(run: Run) -> Iterator[tuple[System, float]]:
    """Every system with each of its units, and the tokens that one holds."""
    params: Params = run.params
    layout = run.model.shard().kv_layout()
    for system in run.systems:
        allocator = system.allocator
        if hasattr(allocator, "block_size"):
            for block_size in params.block_sizes:
                yield replace(system, allocator=replace(allocator, block_size=block_size)), float(block_size)
        elif hasattr(allocator, "page_group"):
            sliced = allocator.tensor_slicing
            for page_group in params.sliced_page_groups if sliced else params.page_groups:
                geometry = row_geometries(layout, checked_page_group(page_group), sliced)[0]
                tokens = geometry.page_group / geometry.token_stride
                yield replace(system, allocator=replace(allocator, page_group=page_group)), tokens
        else:
            raise UserError(f"systems: {system.name} has no unit to change; those with blocks or page-groups have")


def _cell(run: Run, replayer: Replayer, system: System, workload: Workload) -> Frames:
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


def _summary(run: Run, points: pd.DataFrame) -> Iterator[SummaryRow]:
    evidence = "measured" if run.clock == "measured" else "conditional"
    shared = {"experiment": NAME, "paper": "kvarena", "figure": NAME, "panel": panel_of(run, run.trace.name),
              "evidence": evidence}  # fmt: skip
    for system in run.systems:
        own = points[points.system == system.name]
        for tokens, rows in own.groupby("tokens"):
            for column, (quantity, unit) in QUANTITIES.items():
                name, _, kind = quantity.partition(":")
                full = f"{name}_vs_tokens_per_unit" + (f":{kind}" if kind else "")
                yield row(median_interval(rows[column]), quantity=full, x=tokens, unit=unit, **shared,
                          **columns(run, system))  # fmt: skip


def draw(summary: pd.DataFrame) -> Figure:
    """Requests at once, memory in partly filled units, and driver calls, over tokens per unit."""
    device = f"{summary.panel.iloc[0]}; {summary.clock.iloc[0]}, {summary.device.iloc[0]}"
    figure, axes = plots.canvas(1, 3, width=5)
    for axis, quantity, label in zip(
        axes,
        (HEADLINE, "share_of_kv_memory_vs_tokens_per_unit:last_block_waste", "units_per_step_vs_tokens_per_unit"),
        ("mean batched requests", "% of the pool in partly filled units", "driver calls per tensor and step"),
        strict=True,
    ):
        _lines(axis, summary[summary.quantity == quantity])
        axis.set(xlabel="tokens per unit", ylabel=label, title=device, ylim=(0, None))
    axes[0].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    return figure


def _lines(axis: Axes, rows: pd.DataFrame) -> None:
    plots.lines(axis, rows)
    axis.set_xscale("log", base=2)
