"""Throughput on long prompts (vAttention Figs 9 and 11): how fast are requests served that all wait at the door?

    requests per minute = 60 x requests / time from the first arrival to the last finish

Nothing in it was fitted to these figures but, on an H100, one point each for two kernels (conf/engine says which).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvarena.experiments.kit import looks, plots
from kvarena.experiments.kit.long_contexts import READS as READS
from kvarena.experiments.kit.long_contexts import assumed_lengths, runs_of_long_contexts, unread_of_long_contexts
from kvarena.experiments.kit.published_models import by_model, of_model
from kvarena.experiments.kit.replay import Replayer, example_of, workload_of
from kvarena.harness.record.metrics import makespan_s
from kvarena.harness.record.progress import Progress
from kvarena.harness.record.record import Frames, Measured, Recorder
from kvarena.harness.record.summary import SummaryRow, frame, published_values, row
from kvarena.harness.record.time_averages import Average, averages
from kvarena.harness.run.published import is_earned, named
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System

NAME = "offline_throughput"
HEADLINE = "offline_throughput"
FIGURES = ("fig9", "fig11")  # on the A100 and on the H100
OURS = {
    "makespan": "s", "mean_batched_requests": "requests", "output_tokens_per_s": "tok/s", "preemptions": "count",
    "finished": "count", "allocator_stall_share": "%", "prefill_share": "%",
}  # fmt: skip


@dataclass
class Params:
    """`params.*` of conf/experiment/offline_throughput.yaml; null there means: by the profile."""

    models: dict[str, int] = field(default_factory=dict)  # name -> tensor-parallel degree
    context: int | None = None  # tokens of the longest sequence; null: the model's
    memory_share: float = 0.9  # of a device's memory, for weights, activations and K/V
    pool_bytes: int | None = None  # of K/V on one device; null: what memory_share leaves


unread = unread_of_long_contexts


def measure(run: Run, recorder: Recorder) -> Measured:
    """Serve all requests with every system, model by model."""
    runs = runs_of_long_contexts(run)
    cells: list[Frames] = []
    with Progress(NAME, len(runs)) as progress:
        for one in runs:
            progress.stage(one.model.name)
            cell = recorder.cell(one.model.name, partial(_cell, one))
            cells.append({name: of_model(one, table) for name, table in cell.items()})
            progress.advance()
    frames = {name: pd.concat([cell[name] for cell in cells], ignore_index=True) for name in cells[0]}
    return Measured(frames, {"workload": example_of(runs[0]).provenance})


def _cell(run: Run) -> Frames:
    """One model: what happened to every request, and totals by system."""
    workload, replayer = workload_of(run), Replayer(run)
    served = [replayer.serve(system, workload) for system in run.systems]
    totals = [_totals(s.requests, s.steps) for s in served]
    return {"requests": pd.concat([s.requests for s in served]), "totals": pd.DataFrame(totals)}


def _totals(requests: pd.DataFrame, steps: pd.DataFrame) -> dict[str, object]:
    done = requests[requests.finish_ps.notna()]
    span_s, busy = makespan_s(requests), float(steps.duration_ps.sum())
    return {
        "system": steps.system.iloc[0],
        HEADLINE: 60 * len(done) / span_s,
        "makespan": span_s,
        "mean_batched_requests": float(averages(steps).set_index("average").batch[Average.OVER_TIME]),
        "output_tokens_per_s": float(done.output_tokens.sum()) / span_s,
        "preemptions": int(requests.num_preemptions.sum()),
        "finished": len(done),
        "allocator_stall_share": 100 * float(steps.stall_ps.sum()) / busy,
        "prefill_share": 100 * float(steps.duration_ps[steps.prefills > 0].sum()) / busy,
    }


def summarize(run: Run, frames: Frames) -> pd.DataFrame:
    """Fig 9 or 11, and what lies behind it, model by model."""
    return frame(each for one, totals in by_model(run, frames["totals"]) for each in _rows(one, totals))


def _rows(run: Run, totals: pd.DataFrame) -> Iterator[SummaryRow]:
    records: dict[Any, dict[str, float]] = totals.set_index("system").to_dict("index")  # type: ignore[assignment]
    for system in run.systems:
        mine = records[system.name]
        yield row(mine[HEADLINE], quantity=HEADLINE, unit="req/min", **_names(run, system))
        for quantity, unit in OURS.items():
            names = named(run, system, assuming=assumed_lengths(run))
            yield row(mine[quantity], quantity=quantity, unit=unit, **names)


def _names(run: Run, system: System) -> dict[str, Any]:
    """Of the figure that was taken on the run's device, if any."""
    each = [named(run, system, figure, assuming=assumed_lengths(run)) for figure in FIGURES]
    return next(filter(is_earned, each), each[0])


def draw(summary: pd.DataFrame) -> Figure:
    """Bars by system, a panel per model; the published ones beside those that earned their names."""
    panels = list(summary[summary.quantity == HEADLINE].groupby("setup", sort=False))
    theirs = published_values("vattention", quantity=HEADLINE)
    figure, axes = plots.canvas(1, len(panels), width=4.6)
    for axis, (_, rows) in zip(axes, panels, strict=True):
        _bars(axis, rows, theirs)
        axis.set(ylabel="requests/min", ylim=(0, 1.3 * rows.value.max()))
        figure_of = next((each for each in FIGURES if plots.stands_for(rows, each)), None)
        looks.title(axis, rows, figure_of, "offline throughput")
    figure.tight_layout()
    return figure


def _bars(axis: Axes, rows: pd.DataFrame, theirs: pd.DataFrame) -> None:
    styles = looks.looks(rows)
    published = [looks.published_of(rows[rows.label == label], theirs).value for label in rows.label]
    beside = any(len(values) for values in published)
    offset, width = (-0.2, 0.4) if beside else (0.0, 0.7)
    colours = [styles[label].colour for label in rows.label]
    bars = axis.bar([x + offset for x in range(len(rows))], rows.value, width, color=colours)
    axis.bar_label(bars, fmt="%.2f", fontsize=6)
    if beside:
        places = [x + 0.2 for x, values in enumerate(published) if len(values)]
        bars = axis.bar(places, [v.iloc[0] for v in published if len(v)], 0.4, color="#BBBBBB", label="published")
        axis.bar_label(bars, fmt="%.2f", fontsize=6)
        axis.legend(fontsize=7, frameon=False, loc="upper right")
    names = [styles[label].name for label in rows.label]
    axis.set_xticks(range(len(rows)), names, rotation=30, ha="right", fontsize=8)
