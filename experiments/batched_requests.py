"""How many requests run at once under each allocator (PagedAttention Fig 13), as a mean over iterations.

The figure's window is its artifact's: a trace of 900 s, iterations from 600 s on, the drain after the last arrival
included. A second run without a drain stands beside it, under its own name.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvarena.errors import UserError
from kvarena.experiments import plots
from kvarena.experiments.averages import Average, averages, by_interval, window
from kvarena.experiments.replay import Replayer, columns, panel_of, trace_named, workload_of
from kvarena.harness.progress import Progress
from kvarena.harness.record import Frames, Outcome, Recorder
from kvarena.harness.run import Run
from kvarena.harness.summary import SummaryRow, frame, published_values, row
from kvarena.harness.systems import System
from kvarena.harness.workload import Workload

NAME = "batched_requests"
HEADLINE = "mean_batched_requests"
COMPARED = "with_drain"  # the window of the published figure


@dataclass
class Load:
    """One load and the window in which the batch is averaged."""

    figure: str  # whose panel it is
    window: str  # its name: with_drain is compared with the paper
    trace: str  # of conf/trace/
    rate: float  # requests/s; arrival.rate overrides it
    duration_s: float  # arrivals before this time
    window_s: list[float] | None = None  # [from, to]; null: the steps that leave someone waiting
    systems: list[str] | None = None  # of the experiment's; null: all

    @property
    def key(self) -> str:
        """Name of its cells."""
        return f"{self.figure}-{self.window}"


@dataclass
class Params:
    """`params.*` of conf/experiment/batched_requests.yaml; null there means: by the profile."""

    loads: list[Load] = field(default_factory=list)
    paths: dict[str, str | None] = field(default_factory=dict)  # trace -> local file, beside trace.path
    pool_bytes: int | None = None  # null: the pool the engine ran with, else what the device has left
    record_every_s: float = 10.0  # steps.parquet sums them up by so many seconds


def run(run: Run, recorder: Recorder) -> Outcome:
    """Serve every load with every system. Raises UserError where there is none, or one twice."""
    loads: list[Load] = run.params.loads
    if not loads or len({load.key for load in loads}) < len(loads):
        raise UserError("params.loads: at least one load, and no figure with the same window twice")
    replayer, notes = Replayer(run), {}
    cells: list[Frames] = []
    rows: list[SummaryRow] = []
    served = [(load, [s for s in run.systems if load.systems is None or s.name in load.systems]) for load in loads]
    with Progress(NAME, sum(len(systems) for _, systems in served)) as progress:
        for load, systems in served:
            rate = run.arrival.rate or load.rate
            workload = _workload(run, load, rate)
            notes[load.key] = {**workload.provenance, "rate_asked": workload.rate, "window_s": load.window_s}
            for system in systems:
                progress.stage(f"{load.key} {system.name}")
                measure = partial(_cell, run, replayer, system, workload, load)
                cell = recorder.cell(f"{load.key}-{system.name}", measure)
                cells.append({name: table.assign(load=load.key) for name, table in cell.items()})
                rows += _rows(run, system, load, f"{panel_of(run, load.trace)} {rate:g} req/s", cell["averages"])
                progress.advance()
    summary = frame(rows)
    steps, requests = (pd.concat([c[name] for c in cells], ignore_index=True) for name in ("steps", "requests"))
    return Outcome(summary, requests, steps, HEADLINE, draw(summary), notes)


def _workload(run: Run, load: Load, rate: float) -> Workload:
    trace = trace_named(run, load.trace, run.params.paths.get(load.trace))
    return workload_of(run, trace, rate=rate, duration_s=load.duration_s)


def _cell(run: Run, replayer: Replayer, system: System, workload: Workload, load: Load) -> Frames:
    requests, steps, _ = replayer.serve(system, workload)
    means = averages(window(steps, load.window_s)).assign(
        peak=int(steps.requests.max()), preemptions=int(steps.preempted.sum())
    )
    return {"averages": means, "steps": by_interval(steps, run.params.record_every_s), "requests": requests}


def _rows(run: Run, system: System, load: Load, panel: str, means: pd.DataFrame) -> Iterator[SummaryRow]:
    """Nothing was fitted to Fig 13: the engine's constants come from Fig 12a, the pool from Fig 2."""
    evidence = "measured" if run.clock == "measured" else "predicted"
    shared = {"experiment": NAME, "panel": panel, "evidence": evidence, **columns(run, system)}
    mean = means.set_index("average")
    published = {"paper": "pagedattention", "figure": load.figure}
    ours = {"paper": "kvarena", "figure": NAME}
    batch = float(mean.batch[Average.OVER_ITERATIONS])
    if load.window == COMPARED:
        yield row(batch, quantity=HEADLINE, unit="requests", **published, **shared)
    else:
        yield row(batch, quantity=f"{HEADLINE}:{load.window}", unit="requests", **ours, **shared)
    for average in (Average.OVER_TIME, Average.WHILE_WAITING):
        if mean.num_steps[average]:
            value = float(mean.batch[average])
            yield row(value, quantity=f"{HEADLINE}_{average}:{load.window}", unit="requests", **ours, **shared)
    for count in ("peak", "preemptions"):
        value = int(means[count].iloc[0])
        yield row(value, quantity=f"{count}:{load.window}", unit="requests", **ours, **shared)


def draw(summary: pd.DataFrame) -> Figure:
    """Fig 13, ours beside the published bars; dots for the window without a drain."""
    theirs = published_values("pagedattention", quantity=HEADLINE)
    batches = summary[summary.quantity.str.partition(":")[0] == HEADLINE]
    panels = list(dict.fromkeys(batches.panel))
    figure, axes = plots.canvas(1, len(panels), width=6)
    for axis, panel in zip(axes, panels, strict=True):
        rows = batches[batches.panel == panel]
        _bars(axis, rows, theirs[theirs.panel == panel])
        device = f"{rows.clock.iloc[0]}, {rows.device.iloc[0]}"
        axis.set(ylabel="mean batched requests", title=f"PagedAttention {rows.figure.iloc[0]}: {panel}\n{device}")
        axis.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    return figure


def _bars(axis: Axes, ours: pd.DataFrame, theirs: pd.DataFrame) -> None:
    systems = list(dict.fromkeys(ours.system))
    place = {name: x for x, name in enumerate(systems)}
    main = "with the drain, as published" if ours.clock.iloc[0] == "modelled" else "while requests wait"
    pieces = [
        (ours[~ours.quantity.str.contains(":")], "#0072B2", main),
        (ours[ours.quantity.str.contains(":")], "#56B4E9", "without a drain"),
        (theirs[theirs.system.isin(systems)], "#BBBBBB", "published"),
    ]
    pieces = [piece for piece in pieces if len(piece[0])]
    for number, (rows, colour, label) in enumerate(pieces):
        offset = 0.25 * (number - (len(pieces) - 1) / 2)
        bars = axis.bar(rows.system.map(place) + offset, rows.value, 0.25, color=colour, label=label)
        axis.bar_label(bars, fmt="%.1f", fontsize=6)
    axis.set_xticks(range(len(systems)), [s.split("/")[0] for s in systems], rotation=30, ha="right", fontsize=8)
