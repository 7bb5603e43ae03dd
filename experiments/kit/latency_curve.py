"""Curves of normalized latency over request rate, and the rate at which each reaches a limit.

    latency |          .   a search brackets the limit: every rate it tried is a point of the curve,
     limit -+- - - - -/    and the crossing lies between the last two (harness/record/capacity.py)
            |      ..'     shares of the crossing fill in the flat part
            +----------- rate

For PagedAttention's Figs 14, 16 and 17, whose published points are withheld: the search tells where to look.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, NamedTuple, TypeVar

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvarena.errors import UserError
from kvarena.experiments.kit import plots
from kvarena.experiments.kit.replay import Served
from kvarena.harness.record.capacity import capacity, crossing
from kvarena.harness.record.metrics import summarize
from kvarena.harness.record.progress import Progress
from kvarena.harness.record.record import Frames, Recorder
from kvarena.harness.record.summary import Names, SummaryRow, frame, published_values, row
from kvarena.harness.run.published import OURS as OURS_PAPER
from kvarena.harness.run.published import named
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System

LATENCY = "normalized_latency_vs_rate"
CROSSING = "rate_at_0.5_s_per_token"
LIMIT_S = 0.5  # s/token: the usual reading of the paper's "similar latency"
BRACKET = "bracket"  # kind of the two points that a crossing is made of; other points are of kind `point`

ServeAt = Callable[[float], Served]  # requests/s -> what happened
Panel = TypeVar("Panel")


def chosen_panels(panels: dict[str, Panel], only: list[str] | None) -> dict[str, Panel]:
    """The panels to run, by figure. Raises UserError for one that is not there, and for none."""
    for figure in only or ():
        if figure not in panels:
            raise UserError(f"params.only: no panel is called {figure!r}. There are: {', '.join(panels)}")
    if not panels:
        raise UserError("params.panels: at least one panel, by figure")
    return {figure: panel for figure, panel in panels.items() if figure in (only or panels)}


@dataclass
class Curves:
    """Keys of `params` that say which rates are replayed: given ones, or those that a search for the crossing tries."""

    rates: list[float] = field(default_factory=list)  # requests/s of every system; empty: search
    tolerance: float = 0.05  # of the search: ratio of the two rates that bracket the crossing
    stride: float = 1.25  # ratio of the search's first rates
    shares: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75])  # of the crossing: replayed too


def unread_rates(curves: Curves, guesses: Iterable[str]) -> dict[str, str]:
    """Keys of rates and their search that are not read; `guesses`: those that say where it begins."""
    rules = {"arrival.rate": "params.rates=[...] are the rates; without any a search finds them"}
    if curves.rates:
        for key in ("params.tolerance", "params.stride", "params.shares", *guesses):
            rules[key] = "the rates of params.rates are replayed; params.rates=[] searches for 0.5 s/token"
    return rules


def unread_panels(panels: Iterable[str], only: list[str] | None) -> dict[str, str]:
    """Keys of panels that do not run."""
    return {
        f"params.panels.{figure}": f"params.only={only} leaves it out"
        for figure in panels
        if figure not in (only or panels)
    }


def unread_traces(run: Run[object], traces: Collection[str], instead: str, of_all: Collection[str]) -> dict[str, str]:
    """Keys of the run's trace that are not read where panels name their `traces`, its own among them or not.

    `of_all`: those of its fields that every panel takes.
    """
    if "trace" in run.given and set(traces) != {run.trace.name}:
        return {"trace": f"the panels name their traces; {instead} names one"}
    if run.trace.name in traces:
        return {}
    kept = f"no panel of this run has trace={run.trace.name}, whose it would be; trace=NAME chooses the one it is for"
    return {f"trace.{each.name}": kept for each in fields(run.trace) if each.name not in of_all}


class Line(NamedTuple):
    """One system's curve in one panel."""

    key: str  # of its cell: lines of one key are replayed once
    run: Run[object]  # with the panel's trace
    system: System
    figure: str | None  # the figure or panel that it is drawn for
    detail: str  # what ran, beside model, trace and devices
    serve_at: ServeAt
    guess: float  # requests/s where the search begins
    point: Mapping[str, Any] = {}  # what the figure states of its points beside what the run says
    assuming: str = ""  # what a modelled line rests on

    def names(self, *, ours: bool = False, x: float | None = None) -> Names:
        """Columns that name a row of this line: of a published quantity, or of one of `ours`."""
        figure, point = (None, {}) if ours or self.figure not in self.run.published else (self.figure, self.point)
        return named(self.run, self.system, figure, detail=self.detail, x=x, assuming=self.assuming, **point)


# Our own quantities at every point, and their units; docs/metrics.md has the formulas.
OURS = {
    "ttft_p50_s": "s", "ttft_p99_s": "s", "tpot_p50_s": "s", "tpot_p99_s": "s", "queueing_p99_s": "s",
    "rate_asked_per_s": "req/s", "rate_reached_per_s": "req/s", "output_tokens_per_s": "tok/s",
    "mean_batched_sequences": "sequences", "preemptions": "count", "refused": "count", "finished": "count",
}  # fmt: skip


def measure_lines(run: Run[Curves], recorder: Recorder, lines: Sequence[Line]) -> Frames:
    """Every point of every line: columns line (its key), system, kind, rate and metrics.

    Raises UserError where two lines would have the same rows.
    """
    _refuse_twins(lines)
    first = {line.key: line for line in reversed(lines)}
    points = []
    with Progress(run.experiment, len(first)) as progress:
        for key in dict.fromkeys(line.key for line in lines):
            progress.stage(key)
            cell = recorder.cell(key, partial(_measure, run.params, first[key]))
            points.append(cell["points"].assign(line=key, system=first[key].system.name))
            progress.advance()
    return {"points": pd.concat(points, ignore_index=True)}


def _refuse_twins(lines: Sequence[Line]) -> None:
    told: dict[tuple[str, str], str] = {}
    for line in lines:
        names = line.names(ours=True)
        other = told.setdefault((names["setup"], names["label"]), line.key)
        if other != line.key:
            raise UserError(f"params: {other} and {line.key} are one and the same curve, of {names['setup']}")


def guess_of(guesses: dict[str, float], system: System) -> float:
    """Where the search of a system's crossing begins: by name, else `others`. Raises UserError where neither is."""
    guess = guesses.get(system.name) or guesses.get("others")
    if guess is None:
        raise UserError(f"params.guess: needs {system.name} or others, in requests/s")
    return guess


def _measure(curves: Curves, line: Line) -> Frames:
    """A row per rate, of kind `point`, or `bracket` where it is one of the two around the limit."""
    points: dict[float, dict[str, float]] = {}

    def latency_s(rate: float) -> float:
        if rate not in points:
            points[rate] = _metrics(line.serve_at(rate))
        return points[rate]["normalized_latency_s"]

    bracket: tuple[float, ...] = ()
    for rate in curves.rates:
        latency_s(rate)
    if not curves.rates:
        bracket = capacity(latency_s, LIMIT_S, line.guess, curves.tolerance, curves.stride)
        low, high = ((rate, latency_s(rate)) for rate in bracket)
        at_limit = crossing(low, high, LIMIT_S)
        for share in curves.shares:
            latency_s(float(f"{at_limit * share:.3g}"))
    rows = [{"kind": BRACKET if rate in bracket else "point", "rate": rate, **points[rate]} for rate in sorted(points)]
    return {"points": pd.DataFrame(rows)}


def _metrics(served: Served) -> dict[str, float]:
    steps, iterations = served.steps, float(served.steps.steps.sum())
    batch = float(((steps.decodes + steps.prefills) * steps.steps).sum()) / iterations
    return summarize(served.requests, steps, served.resumed_gaps_ps) | {"mean_batched_sequences": batch}


def crossing_of(points: pd.DataFrame) -> float | None:
    """The rate at the limit, from the two points of kind `bracket`; None where it was not searched."""
    bracket = points[points.kind == BRACKET].sort_values("rate")
    if bracket.empty:
        return None
    low, high = zip(bracket.rate.tolist(), bracket.normalized_latency_s.tolist(), strict=True)
    return crossing(low, high, LIMIT_S)


def summarize_lines(lines: Iterable[Line], frames: Frames) -> pd.DataFrame:
    """The summary of the points that `measure_lines` gave."""
    points = frames["points"]
    return frame(row for line in lines for row in _rows(line, points[points.line == line.key]))


def _rows(line: Line, points: pd.DataFrame) -> Iterator[SummaryRow]:
    """The paper's two quantities, and our own."""
    at_limit = crossing_of(points)
    if at_limit is not None:
        yield row(at_limit, quantity=CROSSING, unit="req/s", **line.names())
    for _, point in points.iterrows():
        rate = float(point.rate)
        yield row(float(point.normalized_latency_s), quantity=LATENCY, unit="s/token", **line.names(x=rate))
        ours = line.names(ours=True, x=rate)
        for name, unit in OURS.items():
            if pd.notna(point[name]):
                yield row(float(point[name]), quantity=f"{name}_vs_rate", unit=unit, **ours)


def draw_curves(summary: pd.DataFrame, columns: int = 3) -> Figure:
    """An axis for each setup of the summary's, a line per system; its legend says where it crosses."""
    setups = list(dict.fromkeys(summary[summary.quantity == LATENCY].setup))
    columns = min(columns, len(setups))
    figure, axes = plots.canvas(-(-len(setups) // columns), columns, width=4.8, height=4.8)
    for axis, setup in zip(axes, setups, strict=False):
        _panel_axis(axis, summary[summary.setup == setup])
    return plots.tidy(figure)


class Style(NamedTuple):
    """Of one line."""

    colour: str
    dash: str
    marker: str


def styles_of(rows: pd.DataFrame) -> dict[str, Style]:
    """label -> its line: the allocator's colour; lines of one colour differ in dashes, then in markers."""
    seen, styles = Counter[str](), {}
    for label, allocator in rows.drop_duplicates("label")[["label", "allocator"]].itertuples(index=False):
        colour = plots.colour_of(allocator)
        marker, dash = divmod(seen[colour], len(plots.DASHES))
        styles[label] = Style(colour, plots.DASHES[dash], ".x+"[marker % 3])
        seen[colour] += 1
    return styles


def headed(rows: pd.DataFrame) -> str:
    """Two lines for a title: the published panel where a row stands for it, and what ran: clock and evidence."""
    earned = rows[rows.paper != OURS_PAPER]
    ran = f"{rows.setup.iloc[0]}: {', '.join(dict.fromkeys([rows.clock.iloc[0], *rows.evidence]))}"
    if earned.empty:
        return ran
    return f"PagedAttention Fig {earned.figure.iloc[0].removeprefix('fig')}, {earned.panel.iloc[0]}\n{ran}"


def published_beside(rows: pd.DataFrame) -> pd.DataFrame:
    """The published values of the systems that rows of one label stand for; empty where they are ours."""
    theirs = published_values("pagedattention")
    keys = rows[rows.paper != OURS_PAPER][["figure", "panel", "system"]].drop_duplicates()
    return theirs.merge(keys, on=["figure", "panel", "system"])


def _panel_axis(axis: Axes, ours: pd.DataFrame) -> None:
    """The axis ends at 1 s/token, as the paper's do, or sooner where no curve comes near."""
    curves = ours[ours.quantity == LATENCY]
    crossings = ours[ours.quantity == CROSSING].set_index("label").value
    shown, circled = plots.shown_names(curves), False
    for label, (colour, dash, marker) in styles_of(curves).items():
        rows = curves[curves.label == label].sort_values("x")
        at = f": {crossings[label]:.3g}/s" if label in crossings else ""
        axis.plot(rows.x, rows.value, dash, color=colour, lw=1.3, marker=marker, ms=4, label=f"{shown[label]}{at}")
        theirs = published_beside(rows)
        axis.plot(*_points(theirs), "o", mfc="none", color=colour, ms=6)
        circled |= bool(len(theirs))
    top_s = min(1.0, 1.1 * float(curves.value.max()))
    if top_s > LIMIT_S:
        axis.axhline(LIMIT_S, color="#BBBBBB", lw=0.8, zorder=0)
    axis.set(xlabel="request rate, req/s", ylabel="normalized latency, s/token")
    axis.set_title(f"{headed(curves)}{'; circles: published' if circled else ''}", fontsize=8)
    axis.set_xlim(0, None)
    axis.set_ylim(0, top_s)
    heading = "reaches 0.5 s/token at" if len(crossings) else None
    axis.legend(  # below: steep curves leave no room inside
        fontsize=6.5, frameon=False, title=heading, title_fontsize=6.5,
        loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2,
    )  # fmt: skip


def _points(theirs: pd.DataFrame) -> tuple[list[float], list[float]]:
    """Published points of a curve, and its crossing of the limit."""
    curve, at_limit = (theirs[theirs.quantity == q] for q in (LATENCY, CROSSING))
    return [*curve.x, *at_limit.value], [*curve.value, *[LIMIT_S] * len(at_limit)]
