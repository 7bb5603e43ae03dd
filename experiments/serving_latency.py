"""Normalized latency against request rate (PagedAttention Fig 12), and the highest rate that is sustained.

Where the published points are withheld there are none to replay: the curve is then drawn around the rate at which it
crosses the limit.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvarena.experiments import plots
from kvarena.experiments.latency_curve import CROSSING, LATENCY, LIMIT_S, chosen_panels
from kvarena.experiments.latency_error import log_errors, rms
from kvarena.experiments.replay import Served, columns, panel_of, workload_of
from kvarena.experiments.serving_panels import Curve, OutOfSample, Panel, curves_of, run_of_panel
from kvarena.harness.capacity import capacity
from kvarena.harness.metrics import latencies, summarize
from kvarena.harness.progress import Progress
from kvarena.harness.record import Frames, Outcome, Recorder
from kvarena.harness.run import Run
from kvarena.harness.summary import SummaryRow, frame, published_values, row

NAME = "serving_latency"
HEADLINE = LATENCY
AROUND = (0.25, 0.5, 0.75, 0.9, 0.97, 1.03)  # of the crossing: where an unpublished curve is drawn
OUT_OF_SAMPLE = "out_of_sample"
FAMILIES = {"fastertransformer": "FasterTransformer", "orca": "Orca", "vllm": "vLLM"}  # by scheduler


@dataclass
class Params:
    """`params.*` of conf/experiment/serving_latency.yaml; null there means: by the profile."""

    panels: dict[str, Panel] = field(default_factory=dict)  # by figure: fig12a ...
    only: list[str] | None = None  # figures to run; null: all
    paths: dict[str, str | None] = field(default_factory=dict)  # trace -> file with its lengths; null: the table
    pool_bytes: int | None = None  # null: the pool the engine ran with
    crossing: list[str] = field(default_factory=list)  # systems whose rate at LIMIT_S is searched
    tolerance: float = 0.01  # of that search
    out_of_sample: list[OutOfSample] = field(default_factory=list)


def run(run: Run, recorder: Recorder) -> Outcome:
    """Replay every point of every panel."""
    panels = chosen_panels(run.params.panels, run.params.only)
    curves, points = list(curves_of(run, panels)), list[pd.DataFrame]()
    with Progress(NAME, len(curves)) as progress:
        for curve in curves:
            progress.stage(curve.key)
            cell = recorder.cell(curve.key, partial(_points, curve))
            points.append(cell["points"].assign(figure=curve.figure, engine=curve.run.engine.name))
            progress.advance()
    table = pd.concat(points, ignore_index=True)
    summary = frame(_summary(curves, points))
    provenance = {
        figure: workload_of(run_of_panel(run, panel), rate=1.0, duration_s=panel.duration_s).provenance
        for figure, panel in panels.items()
    }
    return Outcome(summary, pd.DataFrame(), table, HEADLINE, draw(summary), {"workloads": provenance})


def _points(curve: Curve) -> Frames:
    """Every point of the curve, a row each; the last, of kind `crossing`, is the rate at the limit."""
    system, panel, params = curve.system, curve.panel, curve.run.params
    duration_s = panel.duration_s
    if system.scheduler.name == "fastertransformer":
        duration_s = panel.fastertransformer_duration_s or duration_s
    rates = list(panel.rates.get(system.name) or panel.rates.get("others") or [])

    def served(rate: float) -> Served:
        return curve.replayer.serve(system, workload_of(curve.run, rate=rate, duration_s=duration_s))

    crossing = None
    if curve.crossing:
        guess = panel.guess.get(system.name) or panel.guess.get("others") or (rates[-1] if rates else 1.0)
        found = capacity(lambda rate: normalized_latency_s(served(rate).requests), LIMIT_S, guess, params.tolerance)
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
    batch = float((steps.requests * steps.steps).sum()) / iterations
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


def _summary(curves: list[Curve], points: list[pd.DataFrame]) -> Iterator[SummaryRow]:
    named: list[pd.DataFrame] = []
    for curve, rows in zip(curves, points, strict=True):
        common = _common(curve)
        for _, point in rows.iterrows():
            yield from _rows(curve, point, common)
        at = rows[rows.kind == "point"]
        if len(at):
            named.append(pd.DataFrame({"x": at.rate, "value": at.normalized_latency_s, "figure": curve.figure,
                                       "family": FAMILIES.get(curve.system.scheduler.name), **common}))  # fmt: skip
    yield from _errors(pd.concat(named, ignore_index=True))


def _common(curve: Curve) -> dict[str, str]:
    run, system = curve.run, curve.system
    panel = panel_of(run, curve.panel.trace)
    modelled = run.engine.evidence(curve.figure, panel, system.published)
    evidence = "measured" if run.clock == "measured" else modelled
    return {"experiment": NAME, "panel": panel, "evidence": evidence, **columns(run, system)}


def _rows(curve: Curve, point: pd.Series, common: dict[str, str]) -> Iterator[SummaryRow]:
    """A curve out of sample has its latency alone, under a name of its own beside the calibrated one."""
    published, ours = {"paper": "pagedattention", "figure": curve.figure}, {"paper": "kvarena", "figure": NAME}
    if point.kind == "crossing":
        yield row(float(point.rate), quantity=CROSSING, unit="req/s", **published, **common)
        return
    latency, at = float(point.normalized_latency_s), {"x": point.rate, **common}
    if curve.out_of_sample:
        yield row(latency, quantity=f"{HEADLINE}:{OUT_OF_SAMPLE}", unit="s/token", **ours, **at)
        return
    yield row(latency, quantity=HEADLINE, unit="s/token", **published, **at)
    for name, unit in OURS.items():
        if pd.notna(point[name]):
            yield row(float(point[name]), quantity=f"{name}_vs_rate", unit=unit, **ours, **at)


def _errors(points: pd.DataFrame) -> Iterator[SummaryRow]:
    """RMS of log(ours / published), of each family of curves, and of all of one engine where there are several."""
    for (figure, engine), of_engine in points.groupby(["figure", "kernel"], sort=False):
        errors = log_errors(of_engine, str(figure))
        groups = {str(name): rows.index for name, rows in of_engine.groupby("family", sort=False)}
        if len(groups) > 1:
            groups["all systems"] = of_engine.index
        for name, index in groups.items():
            of_group = errors[errors.index.isin(index)]
            if len(of_group):
                first = of_engine.loc[of_group.index[0]]
                shared = {key: first[key] for key in ("experiment", "panel", "model", "clock", "device", "evidence")}
                yield row(rms(of_group), paper="kvarena", figure=NAME, system=name, allocator="-", kernel=engine,
                          quantity="rms_log_error", unit="%", **shared)  # fmt: skip


COLOURS = {  # by allocator; vAttention's systems are told apart by their dashes
    "fastertransformer": "#666666", "orca_max": "#D55E00", "orca_pow2": "#E69F00", "orca_oracle": "#CC79A7",
    "paged": "#0072B2", "vattention": "#009E73",
}  # fmt: skip


def draw(summary: pd.DataFrame) -> Figure:
    """Fig 12: a panel per figure, our curves as lines, the published points as circles."""
    ours = summary[summary.quantity == HEADLINE]
    published = published_values("pagedattention", quantity=HEADLINE)
    others = summary[summary.quantity == f"{HEADLINE}:{OUT_OF_SAMPLE}"]
    figures = list(dict.fromkeys(ours.figure))
    columns, curves = min(3, len(figures)), ours.system.nunique()
    rows, legend_columns = -(-len(figures) // columns), min(4, 2 * columns)
    key = 0.2 * -(-curves // legend_columns) / rows  # height of the legend, in inches of each row
    figure, axes = plots.canvas(rows, columns, height=3.4 + key)
    for axis, name in zip(axes, figures, strict=False):
        panel = ours[ours.figure == name]
        _panel_axis(axis, panel, published[published.figure == name], others[others.panel.isin(panel.panel)])
    for axis in axes[len(figures) :]:
        axis.set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.tight_layout(rect=(0, key / (3.4 + key), 1, 1))
    figure.legend(handles, labels, fontsize=8, frameon=False, loc="lower center", ncols=legend_columns)
    return figure


def _panel_axis(axis: Axes, ours: pd.DataFrame, published: pd.DataFrame, others: pd.DataFrame) -> None:
    """The axis ends at 1 s/token, as the paper's does, or where the curves end."""
    dashes = dict(zip(dict.fromkeys(ours.system[ours.allocator == "vattention"]), plots.DASHES[1:], strict=False))
    for name, rows in ours.groupby("system", sort=False):
        rows = rows.sort_values("x")
        colour = COLOURS.get(rows.allocator.iloc[0], "black")
        axis.plot(rows.x, rows.value, dashes.get(name, "-"), color=colour, lw=1.3, label=str(name).split("/")[0])
        points, other = published[published.system == name], others[others.system == name]
        axis.plot(points.x, points.value, "o", mfc="none", color=colour, ms=5)
        axis.plot(other.x, other.value, "x", color=colour, ms=4)
    notes = ["circles: published"] if published.system.isin(ours.system).any() else ["no published points"]
    notes += ["crosses: constants of the others' curves"] if len(others) else []
    axis.set(xlabel="request rate, req/s", ylabel="normalized latency, s/token")
    axis.set_title(f"{ours.panel.iloc[0]}: {ours.clock.iloc[0]}, {ours.device.iloc[0]}\n{'; '.join(notes)}", fontsize=9)
    axis.set_xlim(0, None)
    axis.set_ylim(0, min(1.0, 1.1 * ours.value.max()))
