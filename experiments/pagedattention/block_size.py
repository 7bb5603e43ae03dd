"""Normalized latency by block size (PagedAttention Fig 18b): small enough to waste little, large enough to read fast.

The paper's curve has two arms. Large blocks waste memory, so fewer requests fit: the replay predicts that. Small
blocks slow the attention kernel: under the modelled clock that arm is missing, unless `params.kernel_cost` says what
the kernel costs; under the measured clock our kernel runs, and shows its own.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import pandas as pd
from matplotlib.axes import Axes

from kvarena.errors import UserError
from kvarena.experiments.kit import block_sweep as blocks
from kvarena.experiments.kit import plots
from kvarena.experiments.kit.cells import Cell, run_cells
from kvarena.experiments.kit.panels import Panel, drawn
from kvarena.experiments.kit.quantities import rows
from kvarena.experiments.kit.reads import reads
from kvarena.experiments.kit.replay import Replayer, example_of, trace_named, workload_of
from kvarena.harness.config import load, names, typed
from kvarena.harness.engine.serving import Serving
from kvarena.harness.modelled.engine_config import EngineConfig
from kvarena.harness.record.record import Frames, Measured, Recorder
from kvarena.harness.record.summary import SummaryRow
from kvarena.harness.run.published import named
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System

HEADLINE = "normalized_latency_vs_block_size"
READS = reads()
FIGURE = "fig18b"
WASTE, BATCH = "last_block_waste", "mean_batched_requests"
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


def unread(run: Run[Params]) -> dict[str, str]:
    """Keys that this run does not read, and what to write instead."""
    params: Params = run.params
    unused = {
        "arrival.rate": "params.rates={trace: requests/s} are the rates, trace by trace",
        "allocator.block_size": "params.block_sizes=[...] are the block sizes",
    }
    if run.trace.name not in params.rates:
        unused["trace"] = f"params.rates names the traces: {', '.join(params.rates)}"
    elif params.paths.get(run.trace.name):
        unused["trace.path"] = f"params.paths.{run.trace.name} is its file"
    for name in params.paths.keys() - params.rates.keys():
        unused[f"params.paths.{name}"] = f"params.rates names the traces: {', '.join(params.rates)}"
    if run.clock == "measured":
        unused["params.kernel_cost"] = "clock=measured runs the kernel itself; it is for clock=modelled"
    else:
        unused["params.rounds"] = "a replay gives the same again under clock=modelled; it is for clock=measured"
    return unused


def measure(run: Run[Params], recorder: Recorder) -> Measured:
    """Replay every trace with every block size."""
    _check(run)
    runs = {name: _of_trace(run, name) for name in run.params.rates}
    workloads = {name: example_of(of_trace).provenance for name, of_trace in runs.items()}
    cells = [Cell(name, partial(_cell, of_trace), {"trace": name}) for name, of_trace in runs.items()]
    return Measured(run_cells(run.experiment, recorder, cells), {"workloads": workloads} | SAID)


def _of_trace(run: Run[Params], name: str) -> Run[Params]:
    """The run of one trace, at its rate."""
    trace = trace_named(run, name, run.params.paths.get(name))
    return replace(run, trace=trace, arrival=replace(run.arrival, rate=run.params.rates[name]))


def _check(run: Run[Params]) -> None:
    """Raises UserError for sizes that no block has, for no trace, and for a cost that is none or has no use."""
    params: Params = run.params
    blocks.check_block_sizes(params.block_sizes)
    if not params.rates:
        raise UserError("params.rates={}: name at least one trace and its rate, in requests/s")
    for size, cost in params.kernel_cost.items():
        if size not in params.block_sizes or not cost > 0:
            raise UserError(
                f"params.kernel_cost: {size}: {cost} is not a time above 0, relative to blocks of 16, for one of "
                f"params.block_sizes={list(params.block_sizes)}"
            )
        for system in filter(blocks.has_blocks, run.systems):
            _check_slowed(run, system, cost)


def _check_slowed(run: Run[Params], system: System, cost: float) -> None:
    """Raises UserError where an engine has no time of attention to change, or not by so much."""
    _context_ps(run, system)  # what the engine refuses by itself
    if not _slows(run, run.engine, system, cost):
        every: list[EngineConfig] = [typed(EngineConfig, load("engine", name), "engine") for name in names("engine")]
        able = [engine.name for engine in every if _slows(run, engine, system, cost)]
        raise UserError(
            f"params.kernel_cost: engine={run.engine.name} cannot read K/V of {run.model.name} in {cost:g} times the "
            "time: it has no such time apart, or the device reads no faster. "
            f"Engines that can: {', '.join(able) or 'none'}"
        )


def _slows(run: Run[Params], engine: EngineConfig, system: System, cost: float) -> bool:
    """Whether K/V takes `cost` times as long to read in that engine's steps."""
    run = replace(run, engine=engine)
    try:
        asked, given = _context_ps(_slowed(run, cost), system), _context_ps(run, system)
    except UserError:  # fitted on something else, or faster than the device
        return False
    return given > 0 and math.isclose(asked, cost * given, rel_tol=0.01)


def _context_ps(run: Run[Params], system: System) -> int:
    """Picoseconds for the K/V of one token."""
    return Serving(run, system).step_model.context_ps


def _cell(run: Run[Params]) -> Frames:
    """Every system and block size on one trace."""
    costs: dict[int | None, float] = dict([(None, 1.0), *run.params.kernel_cost.items()])
    replayers = {cost: Replayer(_slowed(run, cost)) for cost in {*costs.values()}}
    lines = [
        blocks.Line(replayers[costs.get(size, 1.0)], variant, {"system": system.name, "block_size": size})
        for system in run.systems
        for size, variant in blocks.variants(system, run.params.block_sizes)
    ]
    return {"points": blocks.serve_in_turn(run, run.params.rounds, lines, workload_of(run))}


def _slowed(run: Run[Params], cost: float) -> Run[Params]:
    """The run with an engine whose attention takes `cost` times as long to read K/V."""
    engine: EngineConfig = run.engine
    fitted = {name: replace(step, context_ms=step.context_ms * cost) for name, step in engine.fitted.items()}
    attention = {
        name: replace(each, read_efficiency=each.read_efficiency / cost) for name, each in engine.attention.items()
    }
    kv_efficiency = engine.kv_efficiency if fitted or attention else engine.kv_efficiency / cost
    return replace(run, engine=replace(engine, fitted=fitted, attention=attention, kv_efficiency=kv_efficiency))


def summarize(run: Run[Params], frames: Frames) -> Iterator[SummaryRow]:
    """A row for every block size and trace; one for each trace of a system without blocks."""
    table = frames["points"]
    for trace, system in itertools.product(run.params.rates, run.systems):
        rows = table[(table.trace == trace) & (table.system == system.name)]
        for size in run.params.block_sizes if blocks.has_blocks(system) else [None]:
            yield from _rows(_of_trace(run, trace), system, size, rows[rows.block_size == size] if size else rows)


def _rows(run: Run[Params], system: System, size: int | None, samples: pd.DataFrame) -> Iterator[SummaryRow]:
    """One block size of one system."""
    cost = run.params.kernel_cost.get(size) if size else None
    assuming = blocks.assumed(size) if cost is None else f"attention takes {cost:g} times as long as with blocks of 16"
    names = partial(named, run, system, x=size, detail=f"{run.arrival.rate:g} req/s", assuming=assuming,
                    kernel_cost=cost)  # fmt: skip
    taken = [each for each in blocks.quantities(size, FIGURE) if size or each.of != WASTE]
    yield from rows(taken, samples, names)


def _memory(axis: Axes, rows: pd.DataFrame) -> None:
    """Both, of every system that has blocks."""
    right = axis.twinx()
    for side, name, style, colour in ((axis, WASTE, "s-", "contiguous"), (right, BATCH, "^--", "paged")):
        values = rows[rows.quantity == f"{name}_vs_block_size"]
        for _, line in values.sort_values("x").groupby("label", sort=False):
            side.plot(line.x, line.value, style, color=plots.COLOURS[colour], ms=4)
        side.set_ylim(0, None)
        side.yaxis.label.set_color(plots.COLOURS[colour])
    right.set_ylabel("requests in the mean batch")


MEMORY = Panel(_memory, f"({WASTE}|{BATCH})_vs_block_size", "last-block waste, % of held", "block size, tokens",
               what="empty part of last blocks, and batch", doubling=True)  # fmt: skip
draw = partial(drawn, panels=[blocks.BY_SIZE, MEMORY], width=5.2)
