"""Normalized latency against request rate (PagedAttention Fig 12), six panels, and the highest rate that is sustained.

A panel names its model, device, trace and duration, and the rates of each system's curve. Where the published points
are withheld there are none to replay: the curve is then drawn around the rate at which it crosses the limit.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvarena.experiments import plots
from kvarena.experiments.replay import Replayer, Served, columns, panel_of, trace_named, workload_of
from kvarena.harness.capacity import capacity
from kvarena.harness.config import load, typed
from kvarena.harness.metrics import latencies, summarize
from kvarena.harness.model import load_preset
from kvarena.harness.paths import PUBLISHED
from kvarena.harness.progress import Progress
from kvarena.harness.record import Frames, Outcome, Recorder
from kvarena.harness.run import Run
from kvarena.harness.schemas import of
from kvarena.harness.summary import SummaryRow, frame, read_published, row
from kvarena.harness.systems import System

NAME = "serving_latency"
HEADLINE = "normalized_latency_vs_rate"
AROUND = (0.25, 0.5, 0.75, 0.9, 0.97, 1.03)  # of the crossing: where an unpublished curve is drawn
LIMIT_S = 0.5  # s/token: the usual reading of the paper's "similar latency"


@dataclass
class Panel:
    """One panel of the figure."""

    trace: str  # of conf/trace/
    duration_s: float  # of the arrivals
    model: str | None = None  # null: the run's
    tp: int = 1  # devices that share the model: each holds its part of every token
    device: str | None = None  # null: the run's
    batch_size: int | None = None  # of FasterTransformer; null: its own default
    fastertransformer_duration_s: float | None = None  # where it differs
    rates: dict[str, list[float]] = field(default_factory=dict)  # requests/s by system; `others`: all not named
    guess: dict[str, float] = field(default_factory=dict)  # requests/s where the search for the crossing begins


@dataclass
class Params:
    """`params.*` of conf/experiment/serving_latency.yaml; null there means: by the profile."""

    panels: dict[str, Panel] = field(default_factory=dict)  # by figure: fig12a ...
    only: list[str] | None = None  # figures to run; null: all
    paths: dict[str, str | None] = field(default_factory=dict)  # trace -> file with its lengths; null: the table
    pool_bytes: int | None = None  # null: the pool the engine ran with
    crossing: list[str] = field(default_factory=list)  # systems whose rate at LIMIT_S is searched
    tolerance: float = 0.01  # of that search


def run(run: Run, recorder: Recorder) -> Outcome:
    """Replay every point of every panel."""
    panels = {name: p for name, p in run.params.panels.items() if name in (run.params.only or run.params.panels)}
    points: list[pd.DataFrame] = []
    provenance: dict[str, Any] = {}
    with Progress(NAME, len(panels) * len(run.systems)) as progress:
        for figure, panel in panels.items():
            panel_run = _panel_run(run, panel)
            replayer = Replayer(panel_run)
            provenance[figure] = workload_of(panel_run, rate=1.0, duration_s=panel.duration_s).provenance
            for system in run.systems:
                progress.stage(f"{figure} {system.name}")
                key = f"{figure}-{system.name}"
                cell = recorder.cell(key, partial(_curve, panel_run, replayer, _sized(system, panel), panel))
                points.append(cell["points"].assign(figure=figure))
                progress.advance()
    table = pd.concat(points, ignore_index=True)
    summary = frame(_summary(run, panels, table))
    return Outcome(summary, pd.DataFrame(), table, HEADLINE, draw(summary), {"workloads": provenance})


def _panel_run(run: Run, panel: Panel) -> Run:
    """The run with the panel's model, device and trace."""
    if panel.model is not None:
        run = replace(run, model=load_preset(panel.model, tp=panel.tp))
    if panel.device is not None:
        run = replace(run, device=typed(of("device", panel.device), load("device", panel.device), "device"))
    trace, path = trace_named(run, panel.trace), run.params.paths.get(panel.trace)
    return replace(run, trace=replace(trace, path=path or trace.path))


def _sized(system: System, panel: Panel) -> System:
    """FasterTransformer's batch is as large as memory allows: a number for each model and trace."""
    if panel.batch_size is None or not hasattr(system.allocator, "batch_size"):
        return system
    return replace(system, allocator=replace(system.allocator, batch_size=panel.batch_size))


def _curve(run: Run, replayer: Replayer, system: System, panel: Panel) -> Frames:
    """Every point of one system's curve, a row each; the last, of kind `crossing`, is the rate at the limit."""
    duration_s = panel.duration_s
    if system.scheduler.name == "fastertransformer":
        duration_s = panel.fastertransformer_duration_s or duration_s
    rates = list(panel.rates.get(system.name) or panel.rates.get("others") or [])

    def served(rate: float) -> Served:
        return replayer.serve(system, workload_of(run, rate=rate, duration_s=duration_s))

    crossing = None
    if system.name in run.params.crossing:
        guess = panel.guess.get(system.name) or panel.guess.get("others") or (rates[-1] if rates else 1.0)
        found = capacity(lambda rate: normalized_latency_s(served(rate).requests), LIMIT_S, guess, run.params.tolerance)
        crossing = (found.rate * found.above) ** 0.5
        rates = rates or [float(f"{crossing * share:.3g}") for share in AROUND]
    rows = [{"kind": "point", "rate": rate, **_metrics(served(rate))} for rate in rates]
    if crossing is not None:
        rows.append({"kind": "crossing", "rate": crossing})
    return {"points": pd.DataFrame(rows, columns=None if rows else ["kind", "rate"]).assign(system=system.name)}


def normalized_latency_s(requests: pd.DataFrame) -> float:
    """Mean of E2E latency / output tokens, in s/token: the paper's metric."""
    return float(latencies(requests).normalized_s.mean())


def _metrics(served: Served) -> dict[str, float]:
    steps, iterations = served.steps, float(served.steps.steps.sum())
    batch = float(((steps.decodes + steps.prefills) * steps.steps).sum()) / iterations
    more = {"mean_batched_requests": batch, "clock_events_per_step": len(steps) / iterations}
    return summarize(served.requests, steps, served.resumed_gaps_ps) | more


# Our own quantities at every point, and their units; docs/metrics.md has the formulas.
OURS = {
    "ttft_p50_s": "s", "ttft_p99_s": "s", "tpot_p50_s": "s", "tpot_p99_s": "s", "itl_p50_s": "s", "itl_p99_s": "s",
    "e2el_p50_s": "s", "e2el_p99_s": "s", "queueing_p50_s": "s", "queueing_p99_s": "s", "stall_mean_s": "s",
    "rate_asked_per_s": "req/s", "rate_reached_per_s": "req/s", "output_tokens_per_s": "tok/s",
    "mean_batched_requests": "requests", "preemptions": "count", "refused": "count", "finished": "count",
    "clock_events_per_step": "ratio",
}  # fmt: skip


def _summary(run: Run, panels: dict[str, Panel], table: pd.DataFrame) -> Iterator[SummaryRow]:
    for figure, panel in panels.items():
        panel_run = _panel_run(run, panel)
        name = panel_of(panel_run, panel.trace)
        for system in run.systems:
            rows = table[(table.figure == figure) & (table.system == system.name)]
            common = {"experiment": NAME, "panel": name, **columns(panel_run, system)}
            for _, point in rows.iterrows():
                yield from _rows(panel_run, system, figure, point, common)


def _rows(run: Run, system: System, figure: str, point: pd.Series, common: dict[str, str]) -> Iterator[SummaryRow]:
    fitted = bool(system.published) and run.trace.name == "sharegpt"
    evidence = "measured" if run.clock == "measured" else "calibrated" if fitted else "predicted"
    published = {"paper": "pagedattention", "figure": figure}
    if point.kind == "crossing":
        yield row(float(point.rate), quantity="rate_at_0.5_s_per_token", unit="req/s", evidence=evidence,
                  **published, **common)  # fmt: skip
        return
    yield row(float(point.normalized_latency_s), quantity=HEADLINE, x=point.rate, unit="s/token", evidence=evidence,
              **published, **common)  # fmt: skip
    for name, unit in OURS.items():
        if pd.notna(point[name]):
            yield row(float(point[name]), paper="kvarena", figure=NAME, quantity=f"{name}_vs_rate", x=point.rate,
                      unit=unit, evidence=evidence, **common)  # fmt: skip


COLOURS = {
    "FasterTransformer": "#666666", "Orca(Max)": "#D55E00", "Orca(Pow2)": "#E69F00", "Orca(Oracle)": "#CC79A7",
    "vLLM": "#0072B2",
}  # fmt: skip


def draw(summary: pd.DataFrame) -> Figure:
    """Fig 12: a panel per figure, our curves as lines, the published points as circles."""
    ours = summary[summary.quantity == HEADLINE]
    published = read_published(PUBLISHED)
    published = published[(published.paper == "pagedattention") & (published.quantity == HEADLINE)]
    figures = list(dict.fromkeys(ours.figure))
    columns = min(3, len(figures))
    figure, axes = plots.canvas(-(-len(figures) // columns), columns)
    for axis, name in zip(axes, figures, strict=False):
        _panel_axis(axis, ours[ours.figure == name], published[published.figure == name])
    for axis in axes[len(figures) :]:
        axis.set_visible(False)
    axes[0].legend(fontsize=6, frameon=False, loc="upper left")
    figure.tight_layout()
    return figure


def _panel_axis(axis: Axes, ours: pd.DataFrame, published: pd.DataFrame) -> None:
    """The axis ends at 1 s/token, as the paper's does."""
    for name, rows in ours.groupby("system", sort=False):
        rows = rows.sort_values("x")
        colour = COLOURS.get(str(name), "#009E73")
        dash = "-" if name in COLOURS else plots.DASHES[1 + list(dict.fromkeys(ours.system)).index(name) % 3]
        axis.plot(rows.x, rows.value, dash, color=colour, lw=1.3, label=str(name))
        points = published[published.system == name]
        axis.plot(points.x, points.value, "o", mfc="none", color=colour, ms=5)
    title = f"{ours.panel.iloc[0]}: {ours.clock.iloc[0]}, {ours.device.iloc[0]}"
    has_points = "\ncircles: published" if len(published) else "\nno published points"
    axis.set(xlabel="request rate, req/s", ylabel="normalized latency, s/token", title=title + has_points)
    axis.set_xlim(0, None)
    axis.set_ylim(0, 1)
