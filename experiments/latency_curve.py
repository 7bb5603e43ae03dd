"""Curves of normalized latency over request rate, and the rate at which each reaches a limit.

    latency |          .   a search brackets the limit: every rate it tried is a point of the curve,
     limit -+- - - - -/    and the crossing is interpolated between the last two
            |      ..'     shares of the crossing fill in the flat part
            +----------- rate

For PagedAttention's Figs 14, 16 and 17, whose published points are withheld: the search tells where to look.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import exp, log
from typing import NamedTuple, TypeVar

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvarena.errors import UserError
from kvarena.experiments import plots
from kvarena.experiments.replay import Served, columns
from kvarena.harness.capacity import capacity
from kvarena.harness.metrics import summarize
from kvarena.harness.paths import PUBLISHED
from kvarena.harness.progress import Progress
from kvarena.harness.record import Frames, Recorder
from kvarena.harness.run import Run
from kvarena.harness.summary import SummaryRow, frame, read_published, row
from kvarena.harness.systems import System

LATENCY = "normalized_latency_vs_rate"
CROSSING = "rate_at_0.5_s_per_token"
LIMIT_S = 0.5  # s/token: the usual reading of the paper's "similar latency"

ServeAt = Callable[[float], Served]  # requests/s -> what happened


Panel = TypeVar("Panel")


def chosen_panels(panels: dict[str, Panel], only: list[str] | None) -> dict[str, Panel]:
    """The panels to run, by figure. Raises UserError for one that is not there."""
    for figure in only or ():
        if figure not in panels:
            raise UserError(f"params.only: no panel is called {figure!r}. There are: {', '.join(panels)}")
    return {figure: panel for figure, panel in panels.items() if figure in (only or panels)}


@dataclass
class Curves:
    """Keys of `params` that say which rates are replayed: given ones, or those that a search for the crossing tries."""

    rates: list[float] = field(default_factory=list)  # requests/s of every system; empty: search
    tolerance: float = 0.05  # of the search: ratio of the two rates that bracket the crossing
    stride: float = 1.25  # ratio of the search's first rates
    shares: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75])  # of the crossing: replayed too


class Line(NamedTuple):
    """One system's curve in one panel."""

    key: str  # of its cell: lines of one key are replayed once
    system: System
    figure: str  # fig14a ...; the experiment's own name where no published figure has this panel
    panel: str
    evidence: str
    serve_at: ServeAt
    guess: float  # requests/s where the search begins


# Our own quantities at every point, and their units; docs/metrics.md has the formulas.
OURS = {
    "ttft_p50_s": "s", "ttft_p99_s": "s", "tpot_p50_s": "s", "tpot_p99_s": "s", "queueing_p99_s": "s",
    "rate_asked_per_s": "req/s", "rate_reached_per_s": "req/s", "output_tokens_per_s": "tok/s",
    "mean_batched_sequences": "sequences", "preemptions": "count", "refused": "count", "finished": "count",
}  # fmt: skip


def measure_lines(run: Run, recorder: Recorder, lines: Sequence[Line]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The summary, and every point (columns figure, panel, system, kind, rate and metrics)."""
    keys = list(dict.fromkeys(line.key for line in lines))
    points: dict[str, pd.DataFrame] = {}
    with Progress(run.experiment, len(keys)) as progress:
        for line in lines:
            if line.key not in points:
                progress.stage(line.key)
                points[line.key] = recorder.cell(line.key, partial(_measure, run.params, line))["points"]
                progress.advance()
    tables = [points[i.key].assign(figure=i.figure, panel=i.panel, system=i.system.name) for i in lines]
    summary = frame(row for line in lines for row in _rows(run, line, points[line.key]))
    return summary, pd.concat(tables, ignore_index=True)


def guess_of(guesses: dict[str, float], system: System) -> float:
    """Where the search of a system's crossing begins: by name, else `others`. Raises UserError where neither is."""
    guess = guesses.get(system.name) or guesses.get("others")
    if guess is None:
        raise UserError(f"params.guess: needs {system.name} or others, in requests/s")
    return guess


def _measure(curves: Curves, line: Line) -> Frames:
    """A row per rate, of kind `point`; where the crossing was searched, one more of kind `crossing`."""
    points: dict[float, dict[str, float]] = {}

    def latency_s(rate: float) -> float:
        if rate not in points:
            points[rate] = _metrics(line.serve_at(rate))
        return points[rate]["normalized_latency_s"]

    rows: list[dict[str, object]] = []
    if curves.rates:
        for rate in curves.rates:
            latency_s(rate)
    else:
        low, high = capacity(latency_s, LIMIT_S, line.guess, curves.tolerance, curves.stride)
        crossing = _interpolated(low, latency_s(low), high, latency_s(high))
        rows.append({"kind": "crossing", "rate": crossing})
        for share in curves.shares:
            latency_s(float(f"{crossing * share:.3g}"))
    rows += [{"kind": "point", "rate": rate, **points[rate]} for rate in sorted(points)]
    return {"points": pd.DataFrame(rows)}


def _interpolated(low: float, low_s: float, high: float, high_s: float) -> float:
    """The rate at the limit, with latency taken as exponential in the rate between the two."""
    return exp(log(low) + log(high / low) * log(LIMIT_S / low_s) / log(high_s / low_s))


def _metrics(served: Served) -> dict[str, float]:
    steps, iterations = served.steps, float(served.steps.steps.sum())
    batch = float(((steps.decodes + steps.prefills) * steps.steps).sum()) / iterations
    return summarize(served.requests, steps, served.resumed_gaps_ps) | {"mean_batched_sequences": batch}


def _rows(run: Run, line: Line, points: pd.DataFrame) -> Iterator[SummaryRow]:
    """The paper's two quantities, and our own."""
    ours = {"paper": "kvarena", "figure": run.experiment}
    published = {"paper": "pagedattention", "figure": line.figure} if line.figure != run.experiment else ours
    shared = {"experiment": run.experiment, "panel": line.panel, "evidence": line.evidence}
    shared |= columns(run, line.system)
    for _, point in points.iterrows():
        if point.kind == "crossing":
            yield row(float(point.rate), quantity=CROSSING, unit="req/s", **published, **shared)
            continue
        yield row(float(point.normalized_latency_s), quantity=LATENCY, x=point.rate, unit="s/token",
                  **published, **shared)  # fmt: skip
        for name, unit in OURS.items():
            if pd.notna(point[name]):
                yield row(float(point[name]), quantity=f"{name}_vs_rate", x=point.rate, unit=unit,
                          **ours, **shared)  # fmt: skip


COLOURS = {  # of the systems that have one policy only; the others' by allocator, told apart by dashes and markers
    "fastertransformer": "#666666", "orca_max": "#D55E00", "orca_pow2": "#E69F00", "orca_oracle": "#CC79A7",
    "paged": "#0072B2",
}  # fmt: skip


def draw_curves(summary: pd.DataFrame, columns: int = 3) -> Figure:
    """A panel for each of the summary's, a line per system; its legend says where it crosses."""
    panels = list(dict.fromkeys(summary[summary.quantity == LATENCY].panel))
    published = read_published(PUBLISHED)
    published = published[published.paper == "pagedattention"]
    columns = min(columns, len(panels))
    figure, axes = plots.canvas(-(-len(panels) // columns), columns, width=4.8, height=4.8)
    for axis, panel in zip(axes, panels, strict=False):
        ours = summary[summary.panel == panel]
        theirs = published[(published.panel == panel) & published.figure.isin(ours.figure)]
        _panel_axis(axis, ours, theirs)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.tight_layout()
    return figure


def _panel_axis(axis: Axes, ours: pd.DataFrame, published: pd.DataFrame) -> None:
    """The axis ends at 1 s/token, as the paper's do, or sooner where no curve comes near."""
    curves = ours[ours.quantity == LATENCY]
    crossings = ours[ours.quantity == CROSSING].set_index("system").value
    styles = iter([(dash, marker) for marker in ".x+" for dash in plots.DASHES[1:]])
    for name, rows in curves.groupby("system", sort=False):
        rows = rows.sort_values("x")
        allocator = str(rows.allocator.iloc[0])
        colour = COLOURS.get(allocator) or plots.COLOURS.get(allocator.split("_")[0], "#000000")
        dash, marker = ("-", ".") if allocator in COLOURS else next(styles)
        at = f": {crossings[name]:.3g}/s" if name in crossings else ""
        axis.plot(rows.x, rows.value, dash, color=colour, lw=1.3, marker=marker, ms=4, label=f"{name}{at}")
        theirs = published[published.system == name]
        axis.plot(*_points(theirs), "o", mfc="none", color=colour, ms=6)
    top_s = min(1.0, 1.1 * float(curves.value.max()))
    if top_s > LIMIT_S:
        axis.axhline(LIMIT_S, color="#BBBBBB", lw=0.8, zorder=0)
    circles = ", circles: published" if len(published) else ""
    said = ", ".join(dict.fromkeys(str(curves[name].iloc[0]) for name in ("clock", "device", "evidence")))
    title = f"{curves.panel.iloc[0]}\n{said}{circles}"
    axis.set(xlabel="request rate, req/s", ylabel="normalized latency, s/token")
    axis.set_title(title, fontsize=9)
    axis.set_xlim(0, None)
    axis.set_ylim(0, top_s)
    heading = "reaches 0.5 s/token at" if len(crossings) else None
    axis.legend(  # below: steep curves leave no room inside
        fontsize=6.5, frameon=False, title=heading, title_fontsize=6.5,
        loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2,
    )  # fmt: skip


def _points(theirs: pd.DataFrame) -> tuple[list[float], list[float]]:
    """Published points of a curve, and its crossing of the limit."""
    curve, crossing = (theirs[theirs.quantity == q] for q in (LATENCY, CROSSING))
    return [*curve.x, *crossing.value], [*curve.value, *[LIMIT_S] * len(crossing)]
