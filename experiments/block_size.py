"""Normalized latency by block size (PagedAttention Fig 18b): small enough to waste little, large enough to read fast.

The paper's curve has two arms. Large blocks waste memory, so fewer requests fit: the replay predicts that. Small
blocks slow the attention kernel: under the modelled clock that arm is missing, unless `params.kernel_cost` says what
the kernel costs; under the measured clock our kernel runs, and shows its own.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvarena.errors import UserError
from kvarena.experiments import block_sweep as blocks
from kvarena.experiments import plots
from kvarena.experiments.replay import TITLES, Replayer, columns, trace_named, workload_of
from kvarena.harness.engine_config import EngineConfig
from kvarena.harness.progress import Progress
from kvarena.harness.record import Frames, Outcome, Recorder
from kvarena.harness.run import Run
from kvarena.harness.summary import SummaryRow, frame, published_values, row
from kvarena.harness.systems import System

NAME = "block_size"
HEADLINE = "normalized_latency_vs_block_size"
SAID = {
    "rates": "Alpaca's 30.1 req/s is that of the paper's artifact; no script of it has ShareGPT's, 2.0 is assumed",
    "kernel": "modelled: attention reads blocks of any size equally fast, but for params.kernel_cost; so rows below "
    f"{blocks.CLAIMED_FROM} are conditional, and show what memory alone would give",
}


@dataclass
class Params:
    """`params.*` of conf/experiment/block_size.yaml; null there means: by the profile."""

    rates: dict[str, float] = field(default_factory=dict)  # trace of conf/trace/ -> requests/s
    paths: dict[str, str | None] = field(default_factory=dict)  # trace -> file with its lengths; null: the table
    block_sizes: list[int] = field(default_factory=lambda: list(blocks.BLOCK_SIZES))  # tokens
    pool_bytes: int | None = None  # null: the pool the engine ran with
    rounds: int = 1  # measured clock: repetitions, interleaved over block sizes; at least 6 give 95 %
    kernel_cost: dict[int, float] = field(default_factory=dict)  # modelled clock: block size -> time of attention
    # over its time with blocks of 16, as measured somewhere


def run(run: Run, recorder: Recorder) -> Outcome:
    """Replay every trace with every block size."""
    blocks.check_block_sizes(run.params.block_sizes)
    check_kernel_cost(run)
    points: list[pd.DataFrame] = []
    workloads: dict[str, Any] = {}
    with Progress(NAME, len(run.params.rates)) as progress:
        for name, rate in run.params.rates.items():
            progress.stage(f"{name}, {rate:g} req/s")
            trace_run = replace(run, trace=trace_named(run, name, run.params.paths.get(name)))
            workloads[name] = workload_of(trace_run, rate=rate).provenance
            cell = recorder.cell(name, partial(_cell, trace_run, rate))
            points.append(cell["points"].assign(trace=name))
            progress.advance()
    table = pd.concat(points, ignore_index=True)
    summary = frame(_summary(run, table))
    return Outcome(summary, pd.DataFrame(), table, HEADLINE, draw(summary), {"workloads": workloads} | SAID)


def check_kernel_cost(run: Run) -> None:
    """Raises UserError where a cost is given that nothing would use, or that is no cost."""
    for size, cost in run.params.kernel_cost.items():
        if run.clock == "measured":
            raise UserError("params.kernel_cost: clock=measured runs the kernel itself; it is for clock=modelled")
        if size not in run.params.block_sizes or not cost > 0:
            raise UserError(
                f"params.kernel_cost: {size}: {cost} is not a time above 0, relative to blocks of 16, for one of "
                f"params.block_sizes={list(run.params.block_sizes)}"
            )


def _cell(run: Run, rate: float) -> Frames:
    """Every system and block size on one trace."""
    costs = run.params.kernel_cost
    replayers = {cost: Replayer(_slowed(run, cost)) for cost in {1.0, *costs.values()}}
    lines = [
        blocks.Line(replayers[costs.get(size, 1.0)], variant, {"system": system.name, "block_size": size})
        for system in run.systems
        for size, variant in blocks.variants(system, run.params.block_sizes)
    ]
    return {"points": blocks.serve_in_turn(run, lines, workload_of(run, rate=rate))}


def _slowed(run: Run, cost: float) -> Run:
    """The run with an engine whose attention takes `cost` times as long to read K/V."""
    engine: EngineConfig = run.engine
    fitted = {name: replace(step, context_ms=step.context_ms * cost) for name, step in engine.fitted.items()}
    slowed = replace(engine, fitted=fitted, kv_efficiency=min(1.0, engine.kv_efficiency / cost))
    return replace(run, engine=slowed)


def _summary(run: Run, table: pd.DataFrame) -> Iterator[SummaryRow]:
    for trace, system in itertools.product(run.params.rates, run.systems):
        title = TITLES.get(trace, trace)
        panel = title if run.imitates else f"{run.model.name} {title}"
        rows = table[(table.trace == trace) & (table.system == system.name)]
        for size in run.params.block_sizes if blocks.has_blocks(system) else [None]:
            samples = rows[rows.block_size == size] if size else rows
            yield from _rows(run, system, size, samples, {"experiment": NAME, "panel": panel, **columns(run, system)})


def _rows(
    run: Run, system: System, size: int | None, samples: pd.DataFrame, common: dict[str, str]
) -> Iterator[SummaryRow]:
    """One block size of one system; one without blocks has one point, and no x."""
    suffix = "_vs_block_size" if size else ""
    ours = {"paper": "kvarena", "figure": NAME, "x": size, **common}
    ours["evidence"] = blocks.evidence(run, size, size in run.params.kernel_cost)
    published = {"paper": "pagedattention", "figure": "fig18b"} if size else {}
    latency = blocks.estimate(run, samples.normalized_latency_s)
    yield row(latency, quantity=f"normalized_latency{suffix}", unit="s/token", **(ours | published))
    for name, unit in blocks.OURS.items():
        if size or name != "last_block_waste":
            yield row(blocks.estimate(run, samples[name]), quantity=f"{name}{suffix}", unit=unit, **ours)


def draw(summary: pd.DataFrame) -> Figure:
    """Fig 18b, a panel per trace, and below it what the block size does to memory and to the batch."""
    panels = list(dict.fromkeys(summary.panel))
    published = published_values("pagedattention", figure="fig18b")
    figure, axes = plots.canvas(2, len(panels))
    for number, panel in enumerate(panels):
        rows = summary[summary.panel == panel]
        _latency(axes[number], rows, published[published.panel == panel])
        _memory(axes[len(panels) + number], rows)
    figure.tight_layout()
    return figure


def _latency(axis: Axes, rows: pd.DataFrame, published: pd.DataFrame) -> None:
    ours = rows[rows.quantity == HEADLINE]
    plots.lines(axis, ours)
    blocks.hollow(axis, ours)
    if len(published):
        axis.plot(published.x, published.value, "o", mfc="none", color="black", ms=6, label="published")
    blocks.lines_across(axis, rows[rows.quantity == "normalized_latency"])
    axis.set(ylabel="normalized latency, s/token", title=f"{rows.panel.iloc[0]}: {blocks.where(ours)}", ylim=(0, None))
    blocks.block_axis(axis, ours.x)
    axis.legend(fontsize=7, frameon=False)


def _memory(axis: Axes, rows: pd.DataFrame) -> None:
    waste = rows[rows.quantity == "last_block_waste_vs_block_size"].sort_values("x")
    batch = rows[rows.quantity == "mean_batched_requests_vs_block_size"].sort_values("x")
    axis.plot(waste.x, waste.value, "s-", color=plots.COLOURS["contiguous"], ms=4)
    axis.set(title=f"{rows.panel.iloc[0]}: empty part of last blocks, and batch", ylim=(0, None))
    axis.set_ylabel("last-block waste, % of held memory", color=plots.COLOURS["contiguous"])
    right = axis.twinx()
    right.plot(batch.x, batch.value, "^--", color=plots.COLOURS["paged"], ms=4)
    right.set_ylim(0, None)
    right.set_ylabel("requests in the mean batch", color=plots.COLOURS["paged"])
    blocks.block_axis(axis, waste.x)
