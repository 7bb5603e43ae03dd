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

from kvarena.experiments import plots
from kvarena.experiments.averages import Average, averages
from kvarena.experiments.long_contexts import CONDITION, by_system, evidence, runs_of_long_contexts
from kvarena.experiments.replay import Replayer, workload_of
from kvarena.harness.metrics import makespan_s
from kvarena.harness.progress import Progress
from kvarena.harness.record import Frames, Outcome, Recorder
from kvarena.harness.run import Run
from kvarena.harness.summary import SummaryRow, frame, published_values, row

NAME = "offline_throughput"
HEADLINE = "offline_throughput"
LINK = "h100-pcie-link"  # a device whose link is assumed, so what it gives is conditional
FIGURES = {"a100-80gb": "fig9", "h100": "fig11", LINK: "fig11"}  # the device that each was taken on
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


def run(run: Run, recorder: Recorder) -> Outcome:
    """Serve all requests with every system, model by model."""
    rows: list[SummaryRow] = []
    cells: list[Frames] = []
    runs = runs_of_long_contexts(run)
    notes = {"lengths": CONDITION, "workload": workload_of(runs[0]).provenance}
    with Progress(NAME, len(runs)) as progress:
        for one in runs:
            progress.stage(one.model.name)
            cell = recorder.cell(one.model.name, partial(_cell, one))
            cells.append({name: table.assign(model=one.model.name) for name, table in cell.items()})
            rows += _rows(one, cell["totals"])
            progress.advance()
    requests, totals = (pd.concat([c[name] for c in cells], ignore_index=True) for name in ("requests", "totals"))
    summary = frame(rows)
    return Outcome(summary, requests, totals, HEADLINE, draw(summary), notes)


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


def _rows(run: Run, totals: pd.DataFrame) -> Iterator[SummaryRow]:
    figure = FIGURES.get(run.device.name, NAME)
    records: dict[Any, dict[str, float]] = totals.set_index("system").to_dict("index")  # type: ignore[assignment]
    for system, shared in by_system(run, NAME):
        mine, kind = records[system.name], _evidence(run, figure, shared)
        paper = "vattention" if figure != NAME else "kvarena"
        yield row(mine[HEADLINE], paper=paper, figure=figure, quantity=HEADLINE, unit="req/min",
                  evidence=kind, **shared)  # fmt: skip
        for quantity, unit in OURS.items():
            yield row(mine[quantity], paper="kvarena", figure=NAME, quantity=quantity, unit=unit,
                      evidence=kind, **shared)  # fmt: skip


def _evidence(run: Run, figure: str, shared: dict[str, Any]) -> str:
    return "conditional" if run.device.name == LINK else evidence(run, figure, shared)


def draw(summary: pd.DataFrame) -> Figure:
    """Bars by system, a panel per model; the published ones beside them."""
    ours = summary[summary.quantity == HEADLINE]
    theirs = published_values("vattention", quantity=HEADLINE, figure=ours.figure.iloc[0])
    panels = list(dict.fromkeys(ours.panel))
    figure, axes = plots.canvas(1, len(panels), width=4.2)
    for axis, panel in zip(axes, panels, strict=True):
        rows = ours[ours.panel == panel]
        _bars(axis, rows, theirs[theirs.panel == panel])
        axis.set(ylabel="requests/min", title=f"{panel}\n{rows.device.iloc[0]}, {rows.clock.iloc[0]}",
                 ylim=(0, 1.3 * rows.value.max()))  # fmt: skip
        axis.legend(fontsize=7, frameon=False, loc="upper right")
    figure.tight_layout()
    return figure


def _bars(axis: Axes, ours: pd.DataFrame, theirs: pd.DataFrame) -> None:
    place = {name: x for x, name in enumerate(ours.system)}
    for rows, offset, colour, label in ((ours, -0.2, "#0072B2", "this run"), (theirs, 0.2, "#BBBBBB", "published")):
        shown = rows[rows.system.isin(list(place))]
        if len(shown):
            bars = axis.bar([place[s] + offset for s in shown.system], shown.value, 0.4, color=colour, label=label)
            axis.bar_label(bars, fmt="%.2f", fontsize=6)
    axis.set_xticks(range(len(place)), [name.split("/")[0] for name in place], rotation=30, ha="right", fontsize=8)
