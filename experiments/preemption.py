"""Recomputation or swapping (PagedAttention Fig 19): what preempting a request costs, and what it does to a trace.

Fig 19a is one request of 256 tokens, by block size. Its swaps calibrate `device.copy_*` of conf/device/a100-40gb.yaml;
its recomputation does not enter any constant. Fig 19b serves ShareGPT a little above what the pool can hold.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvarena.errors import UserError
from kvarena.experiments import block_sweep as blocks
from kvarena.experiments import plots
from kvarena.experiments import preemption_cost as cost
from kvarena.experiments.replay import Replayer, columns, panel_of, workload_of
from kvarena.harness.model.build import build_model
from kvarena.harness.progress import Progress
from kvarena.harness.record import Frames, Outcome, Recorder
from kvarena.harness.run import Run
from kvarena.harness.summary import SummaryRow, beside_published, frame, published_values, row
from kvarena.harness.systems import System

NAME = "preemption"
HEADLINE = "overhead_vs_block_size"
LATENCY = "normalized_latency_vs_block_size"
RECOMPUTE, SWAP = WAYS = ("recompute", "swap")
DRAWN = 0.9  # Fig 19a's script draws recomputation at 0.9 of what it measured
AS_DRAWN = "recompute (as drawn, measured x0.9)"
FITTED_ON = "a100-40gb"  # its copy_* come from Fig 19a
SAID = {
    "fig19a": f"swaps: device.copy_* of {FITTED_ON} are fitted to this figure; recomputation: fitted to Fig 12a, so "
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


def run(run: Run, recorder: Recorder) -> Outcome:
    """Both figures."""
    params: Params = run.params
    for sizes in (params.block_sizes, params.replay_block_sizes):
        blocks.check_block_sizes(sizes)
    paged = _paged(run)
    with Progress(NAME, 2) as progress:
        progress.stage(f"one request of {params.tokens} tokens")
        costs = recorder.cell("cost", lambda: {"costs": _costs(run, paged)})["costs"]
        progress.advance()
        progress.stage(f"{run.trace.name}, {run.arrival}")
        points = recorder.cell("replay", lambda: _replays(run))["points"]
        progress.advance()
    summary = frame([*_cost_rows(run, paged, costs), *_replay_rows(run, points)])
    notes = {"workload": workload_of(run).provenance, **SAID, "fig19a_log_error": _log_errors(summary)}
    return Outcome(summary, pd.DataFrame(), points, HEADLINE, draw(summary), notes)


def _paged(run: Run) -> System:
    """The system whose blocks are swapped. Raises UserError where there is none."""
    for system in run.systems:
        if system.allocator.name == "paged":
            if run.params.tokens >= run.model.max_tokens or run.params.tokens < 1:
                raise UserError(f"params.tokens={run.params.tokens}: from 1 to {run.model.max_tokens - 1} are possible")
            return system
    raise UserError(f"systems: {NAME} needs one with allocator paged, whose blocks can be swapped")


def _costs(run: Run, paged: System) -> pd.DataFrame:
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


def _replays(run: Run) -> Frames:
    """The trace under each way of preemption; systems without a CPU pool recompute."""
    replayer, lines = Replayer(run), []
    for system in run.systems:
        for size, variant in blocks.variants(system, run.params.replay_block_sizes):
            for way in ways(system):
                labels = {"system": system.name, "way": way, "block_size": size}
                lines.append(blocks.Line(replayer, preempting(variant, way, run.params.swap_bytes), labels))
    return {"points": blocks.serve_in_turn(run, lines, workload_of(run))}


def ways(system: System) -> tuple[str, ...]:
    """Swapping is for blocks."""
    return WAYS if system.allocator.name == "paged" else (RECOMPUTE,)


def preempting(system: System, way: str, swap_bytes: str) -> System:
    """The system, always preempting in one way."""
    allocator = replace(system.allocator, swap_bytes=swap_bytes) if way == SWAP else system.allocator
    return replace(system, allocator=allocator, scheduler=replace(system.scheduler, preemption=way))


def _named(run: Run, system: System, what: str, published: str) -> dict[str, str]:
    """Columns of a row: the published name of a way where the run imitates it, else `paged-<way>/<kernel>`."""
    worn = published if system.published or run.clock == "measured" else None
    variant = f"{system.allocator.name}-{what.replace(' ', '-')}"
    return columns(run, replace(system, published=worn, variant=variant))


def _cost_rows(run: Run, paged: System, costs: pd.DataFrame) -> Iterator[SummaryRow]:
    panel = f"{run.params.tokens} tokens" if run.imitates else f"{run.model.name} {run.params.tokens} tokens"
    for size in run.params.block_sizes:
        samples = 1e3 * costs[costs.block_size == size].drop(columns="block_size")
        for what in samples:
            kind = evidence_of_cost(run, str(what))
            common = {"experiment": NAME, "panel": panel, "x": size, "unit": "ms", "evidence": kind}
            named = _named(run, paged, str(what), AS_DRAWN if what == RECOMPUTE else str(what))
            drawn = DRAWN if named["system"] == AS_DRAWN else 1
            yield row(blocks.estimate(run, drawn * samples[what]), paper="pagedattention", figure="fig19a",
                      quantity=HEADLINE, **common, **named)  # fmt: skip
            yield row(blocks.estimate(run, samples[what]), paper="kvarena", figure=NAME, quantity=f"cost_of_{what}",
                      **common, **columns(run, paged))  # fmt: skip


def evidence_of_cost(run: Run, what: str) -> str:
    """Swaps are calibrated on the device whose copies were fitted to the figure."""
    if run.clock == "measured":
        return "measured"
    return "calibrated" if what != RECOMPUTE and run.device.name == FITTED_ON else "predicted"


def _replay_rows(run: Run, points: pd.DataFrame) -> Iterator[SummaryRow]:
    panel = panel_of(run, run.trace.name)
    for (name, way), rows in points.groupby(["system", "way"], sort=False):
        system = next(s for s in run.systems if s.name == name)
        swappable = len(ways(system)) > 1
        named = _named(run, system, str(way), str(way)) if swappable else columns(run, system)
        for size in run.params.replay_block_sizes if blocks.has_blocks(system) else [None]:
            samples, suffix = (rows[rows.block_size == size], "_vs_block_size") if size else (rows, "")
            ours = {"experiment": NAME, "panel": panel, "x": size, "evidence": blocks.evidence(run, size), **named}
            published = (
                {"paper": "pagedattention", "figure": "fig19b"} if size else {"paper": "kvarena", "figure": NAME}
            )
            yield row(blocks.estimate(run, samples.normalized_latency_s), quantity=f"normalized_latency{suffix}",
                      unit="s/token", **published, **ours)  # fmt: skip
            for quantity, unit in blocks.OURS.items():
                yield row(blocks.estimate(run, samples[quantity]), paper="kvarena", figure=NAME,
                          quantity=f"{quantity}{suffix}", unit=unit, **ours)  # fmt: skip


def _log_errors(summary: pd.DataFrame) -> dict[str, float]:
    """RMS of log(ours / published) by curve of Fig 19a; empty where nothing is published of this panel."""
    pairs = beside_published(summary[summary.quantity == HEADLINE], published_values("pagedattention"))
    pairs = pairs.dropna(subset="published")
    return {
        str(name): float(np.sqrt((np.log(rows.value / rows.published) ** 2).mean()))
        for name, rows in pairs.groupby("system")
    }


COLOURS = {"recompute": "#D55E00", "swap in+out": "#0072B2", "swap in": "#56B4E9", "swap out": "#009E73"}


def draw(summary: pd.DataFrame) -> Figure:
    """Fig 19: left what one preemption costs, right what it does to the trace."""
    published = published_values("pagedattention")
    figure, (left, right) = plots.canvas(1, 2, width=5.6, height=4.0)
    cost = summary[summary.quantity == HEADLINE]
    _cost_axis(left, cost, published[(published.figure == "fig19a") & published.panel.isin(cost.panel)])
    _replay_axis(right, summary, published[published.figure == "fig19b"])
    figure.tight_layout()
    return figure


def _cost_axis(axis: Axes, ours: pd.DataFrame, published: pd.DataFrame) -> None:
    for name, rows in ours.groupby("system", sort=False):
        colour = next(c for what, c in COLOURS.items() if what in str(name).replace("-", " "))
        axis.plot(rows.x, rows.value, "-", color=colour, label=str(name))
        axis.fill_between(rows.x, rows.ci_low.astype(float), rows.ci_high.astype(float), color=colour, alpha=0.15, lw=0)
        points = published[published.system == name]
        axis.plot(points.x, points.value, "o", mfc="none", color=colour, ms=5)
    circles = "; circles: published" if len(published) else ""
    axis.set(ylabel="ms", title=f"{ours.panel.iloc[0]}{circles}\n{blocks.where(ours)}", yscale="log")
    blocks.block_axis(axis, ours.x)
    axis.legend(fontsize=7, frameon=False)


def _replay_axis(axis: Axes, summary: pd.DataFrame, published: pd.DataFrame) -> None:
    ours = summary[summary.quantity == LATENCY]
    for name, rows in ours.groupby("system", sort=False):
        colour = COLOURS["recompute" if "recompute" in str(name) else "swap in+out"]
        axis.plot(rows.x, rows.value, "o-", color=colour, ms=4, label=str(name))
        points = published[(published.system == name) & published.panel.isin(rows.panel)]
        axis.plot(points.x, points.value, "o", mfc="none", color=colour, ms=6)
    blocks.hollow(axis, ours)
    blocks.lines_across(axis, summary[summary.quantity == "normalized_latency"])
    axis.set(ylabel="normalized latency, s/token", title=f"{ours.panel.iloc[0]}: {blocks.where(ours)}", ylim=(0, None))
    blocks.block_axis(axis, ours.x)
    axis.legend(fontsize=7, frameon=False)
