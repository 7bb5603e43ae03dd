"""Recomputation or swapping (PagedAttention Fig 19): what preempting a request costs, and what it does to a trace.

Fig 19a is one request of 256 tokens, by block size. Its swaps calibrate `device.copy_*` of conf/device/a100-40gb.yaml;
its recomputation does not enter any constant. Fig 19b serves ShareGPT a little above what the pool can hold.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import pandas as pd
from matplotlib.axes import Axes

from kvarena.allocators.options import option
from kvarena.errors import UserError
from kvarena.experiments.kit import block_sweep as blocks
from kvarena.experiments.kit.cells import Cell, run_cells
from kvarena.experiments.kit.panels import Panel, curves, drawn
from kvarena.experiments.kit.quantities import rows
from kvarena.experiments.kit.reads import reads
from kvarena.experiments.kit.replay import Replayer, example_of, workload_of
from kvarena.experiments.pagedattention import preemption_cost as cost
from kvarena.harness.model.build import build_model
from kvarena.harness.record.record import Frames, Measured, Recorder
from kvarena.harness.record.statistics import median_interval
from kvarena.harness.record.summary import SummaryRow, row
from kvarena.harness.run.published import as_ours, is_earned, named, without_trace
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System

HEADLINE = "overhead_vs_block_size"
READS = reads("swapping")
RECOMPUTE, SWAP = WAYS = ("recompute", "swap")
DRAWN = 0.9  # Fig 19a's script draws recomputation at 0.9 of what it measured
AS_DRAWN = "recompute (as drawn, measured x0.9)"
SAID = {
    "fig19a": "swaps: device.copy_* of a100-40gb are fitted to this figure; recomputation: fitted to Fig 12a, so "
    f"predicted here, and shown x{DRAWN} beside the published curve, which its script draws so",
    "copies": "modelled: one per block, layer and K or V, as the paper's; measured on a GPU: one per block",
    "fig19b": "modelled: attention reads blocks of any size equally fast; rows below 16 are conditional on that",
}


@dataclass
class Params:
    """`params.*` of conf/experiment/preemption.yaml; null there means: by the profile."""

    tokens: int = 256  # of the request that is preempted, Fig 19a
    block_sizes: list[int] = field(default_factory=lambda: list(blocks.BLOCK_SIZES))  # of Fig 19a
    replay_block_sizes: list[int] = field(default_factory=lambda: list(blocks.BLOCK_SIZES))  # of Fig 19b
    swap_bytes: str = "20GB"  # CPU pool of Fig 19b, where requests are swapped
    pool_bytes: int | None = None  # of Fig 19b; null: the pool the engine ran with
    victims: int = 1  # measured clock: requests that are preempted in turn, together larger than the caches
    rounds: int = 1  # measured clock: repetitions, interleaved over block sizes; at least 6 give 95 %


def unread(run: Run[Params]) -> dict[str, str]:
    """Keys that this run does not read, and what to write instead."""
    unused = {
        "allocator.block_size": "params.block_sizes=[...] and params.replay_block_sizes=[...] are the block sizes",
        "allocator.swap_bytes": "params.swap_bytes is the CPU pool where requests are swapped",
        "scheduler.preemption": "requests are preempted in both ways",
    }
    if run.clock == "modelled":
        for key in ("params.victims", "params.rounds"):
            unused[key] = "a replay gives the same again under clock=modelled; it is for clock=measured"
    return unused


def measure(run: Run[Params], recorder: Recorder) -> Measured:
    """Both figures."""
    params: Params = run.params
    for sizes in (params.block_sizes, params.replay_block_sizes):
        blocks.check_block_sizes(sizes)
    paged = _paged(run)
    cells = [Cell("cost", lambda: {"costs": _costs(run, paged)}), Cell("replay", lambda: _replays(run))]
    frames = run_cells(run.experiment, recorder, cells)
    return Measured(frames, {"workload": example_of(run).provenance, **SAID})


def _paged(run: Run[Params]) -> System:
    """The system whose blocks are swapped. Raises UserError where there is none."""
    for system in run.systems:
        if system.allocator.name == "paged":
            if run.params.tokens >= run.model.max_tokens or run.params.tokens < 1:
                raise UserError(f"params.tokens={run.params.tokens}: from 1 to {run.model.max_tokens - 1} are possible")
            return system
    raise UserError(f"systems: {run.experiment} needs one with allocator paged, whose blocks can be swapped")


def _costs(run: Run[Params], paged: System) -> pd.DataFrame:
    """Seconds of each way by block size and round: columns block_size, and what `preemption_cost` names."""
    sized = dict(blocks.variants(paged, run.params.block_sizes))
    if run.clock == "modelled":
        rows = [{"block_size": b, **cost.modelled_costs(run, s, run.params.tokens)} for b, s in sized.items()]
        return pd.DataFrame(rows)
    model = build_model(run.model, run.device.kind)
    benches = {b: cost.PreemptionBench(run, s, model, run.params.tokens, run.params.victims) for b, s in sized.items()}
    try:
        for bench in benches.values():
            bench.check()
        return pd.DataFrame(
            [{"block_size": b, **bench.sample()} for _ in range(run.params.rounds) for b, bench in benches.items()]
        )
    finally:
        for bench in benches.values():
            bench.close()


def _replays(run: Run[Params]) -> Frames:
    """The trace under each way of preemption; systems without a CPU pool recompute."""
    replayer, lines = Replayer(run), []
    for system in run.systems:
        for size, variant in blocks.variants(system, run.params.replay_block_sizes):
            for way in ways(system):
                labels = {"system": system.name, "way": way, "block_size": size}
                lines.append(blocks.Line(replayer, preempting(variant, way, run.params.swap_bytes), labels))
    return {"points": blocks.serve_in_turn(run, run.params.rounds, lines, workload_of(run))}


def ways(system: System) -> tuple[str, ...]:
    """Swapping is for blocks, and for a scheduler that has both ways."""
    both = system.allocator.name == "paged" and option(system.scheduler, "preemption") is not None
    return WAYS if both else (RECOMPUTE,)


def preempting(system: System, way: str, swap_bytes: str) -> System:
    """The system, always preempting in one way; as it is, where its scheduler has none to choose."""
    if option(system.scheduler, "preemption") is None:
        return system
    allocator = replace(system.allocator, swap_bytes=swap_bytes) if way == SWAP else system.allocator
    return replace(system, allocator=allocator, scheduler=replace(system.scheduler, preemption=way))


def summarize(run: Run[Params], frames: Frames) -> Iterator[SummaryRow]:
    """Both figures' rows."""
    yield from _cost_rows(run, _paged(run), frames["costs"])
    yield from _replay_rows(run, frames["points"])


def _label(run: Run[Params], system: System, way: str) -> str:
    """`paged-swap-in/<kernel>`: a system and what is done with it."""
    return f"{system.shown_allocator}-{way.replace(' ', '-')}/{run.kernel_of(system)}"


def _cost_rows(run: Run[Params], paged: System, costs: pd.DataFrame) -> Iterator[SummaryRow]:
    """The figure's row of every way, recomputation as its script draws it; and what each costs."""
    run, detail = without_trace(run), f"a request of {run.params.tokens} tokens"
    for size in run.params.block_sizes:
        samples = 1e3 * costs[costs.block_size == size].drop(columns="block_size")
        for what in map(str, samples):
            key, label = AS_DRAWN if what == RECOMPUTE else what, _label(run, paged, what)
            names = named(run, paged, "fig19a", key=key, label=label, detail=detail, x=size)
            drawn_as = DRAWN if what == RECOMPUTE and is_earned(names) else 1
            yield row(median_interval(drawn_as * samples[what]), quantity=HEADLINE, unit="ms", **names)
            yield row(median_interval(samples[what]), quantity=f"cost_of_{what}", unit="ms", **as_ours(names))


def _replay_rows(run: Run[Params], points: pd.DataFrame) -> Iterator[SummaryRow]:
    for (name, way), table in points.groupby(["system", "way"], sort=False):
        system = next(s for s in run.systems if s.name == name)
        label = _label(run, system, str(way)) if len(ways(system)) > 1 else None
        for size in run.params.replay_block_sizes if blocks.has_blocks(system) else [None]:
            samples = table[table.block_size == size] if size else table
            names = partial(named, run, system, key=str(way), label=label, x=size, assuming=blocks.assumed(size))
            yield from rows(blocks.quantities(size, "fig19b"), samples, names)


def _costs_panel(axis: Axes, ours: pd.DataFrame) -> None:
    axis.set_yscale("log")
    curves(axis, ours)


COSTS = Panel(_costs_panel, HEADLINE, "ms", "block size, tokens", doubling=True)
draw = partial(drawn, panels=[COSTS, blocks.BY_SIZE], width=5.6, height=4.0)
