"""Curves of normalized latency over request rate, and the rate at which each reaches a limit.

    latency |          .   a search brackets the limit: every rate it tried is a point of the curve,
     limit -+- - - - -/    and the crossing lies between the last two (harness/record/capacity.py)
            |      ..'     shares of the crossing fill in the flat part
            +----------- rate

For PagedAttention's Figs 14, 16 and 17, whose published points are withheld: the search tells where to look.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, NamedTuple, TypeVar

import pandas as pd
from matplotlib.axes import Axes

from kvarena.errors import UserError
from kvarena.experiments.kit.cells import Cell, run_cells
from kvarena.experiments.kit.panels import Panel, curves, drawn
from kvarena.experiments.kit.quantities import Quantity, columns, rows
from kvarena.experiments.kit.replay import Served, workload_of
from kvarena.harness.record.capacity import capacity, crossing
from kvarena.harness.record.metrics import summarize
from kvarena.harness.record.record import Frames, Recorder
from kvarena.harness.record.summary import Names, SummaryRow, row
from kvarena.harness.requests.workload import Workload
from kvarena.harness.run.published import named
from kvarena.harness.run.run import P, Run
from kvarena.harness.run.systems import System
from kvarena.harness.trace.config import TraceConfig

LATENCY = "normalized_latency_vs_rate"
CROSSING = "rate_at_0.5_s_per_token"
LIMIT_S = 0.5  # s/token: the usual reading of the paper's "similar latency"
BRACKET = "bracket"  # kind of the two points that a crossing is made of; other points are of kind `point`

Shown = TypeVar("Shown")


def chosen_panels(panels: dict[str, Shown], only: list[str] | None) -> dict[str, Shown]:
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
    serve: Callable[[Workload], Served]
    guess: float  # requests/s where the search begins
    point: Mapping[str, Any] = {}  # what the figure states of its points beside what the run says; of every kind
    assuming: str = ""  # what a modelled line rests on
    trace: TraceConfig | None = None  # that is served, where it is not quite the run's

    def serve_at(self, rate: float) -> Served:
        """What happens at so many requests/s."""
        return self.serve(workload_of(self.run, self.trace, rate=rate))

    def names(self, figure: str | None = None, *, counted: bool = False, x: float | None = None) -> Names:
        """Columns that name a row of this line: of a published quantity where a figure is given, else of our own."""
        known = figure if figure in self.run.published else None
        return named(self.run, self.system, known, detail=self.detail, x=x, assuming=self.assuming, counted=counted,
                     **self.point)  # fmt: skip


# Our own quantities at every point, and their units; docs/metrics.md has the formulas.
OURS = columns({
    "ttft_p50_s": "s", "ttft_p99_s": "s", "tpot_p50_s": "s", "tpot_p99_s": "s", "queueing_p99_s": "s",
    "rate_asked_per_s": "req/s", "rate_reached_per_s": "req/s", "output_tokens_per_s": "tok/s",
    "mean_batched_sequences": "sequences", "preemptions": "count", "refused": "count", "finished": "count",
}, "_vs_rate")  # fmt: skip


def measure_lines(run: Run[Curves], recorder: Recorder, lines: Sequence[Line]) -> Frames:
    """Every point of every line: columns line (its key), system, kind, rate and metrics.

    Raises UserError where two lines would have the same rows.
    """
    _refuse_twins(lines)
    first = {line.key: line for line in reversed(lines)}
    cells = [
        Cell(key, partial(_measure, run.params, first[key]), {"line": key, "system": first[key].system.name})
        for key in dict.fromkeys(line.key for line in lines)
    ]
    return run_cells(run.experiment, recorder, cells)


def _refuse_twins(lines: Sequence[Line]) -> None:
    told: dict[tuple[str, str], str] = {}
    for line in lines:
        names = line.names()
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


def summarize_lines(lines_of: Callable[[Run[P]], Iterable[Line]], run: Run[P], frames: Frames) -> Iterator[SummaryRow]:
    """Every point and crossing of every line, of the points that `measure_lines` gave."""
    points = frames["points"]
    for line in lines_of(run):
        yield from _rows(line, points[points.line == line.key])


def _rows(line: Line, points: pd.DataFrame) -> Iterator[SummaryRow]:
    """The paper's two quantities, and our own."""
    at_limit = crossing_of(points)
    if at_limit is not None:
        yield row(at_limit, quantity=CROSSING, unit="req/s", **line.names(line.figure))
    quantities = [Quantity(LATENCY, "s/token", "normalized_latency_s", line.figure), *OURS]
    for _, point in points.groupby(points.index, sort=False):
        yield from rows(quantities, point, partial(line.names, x=float(point.rate.iloc[0])))


def crossing_curves(axis: Axes, ours: pd.DataFrame) -> None:
    """The curves of one setup; the legend says where each crosses the limit.

    The axis ends at 1 s/token, as the paper's do, or sooner where no curve comes near.
    """
    latencies, crossings = ours[ours.quantity == LATENCY], ours[ours.quantity == CROSSING].set_index("label").value
    curves(axis, latencies, {str(label): f": {at:.3g}/s" for label, at in crossings.items()})
    top_s = min(1.0, 1.1 * float(latencies.value.max()))
    if top_s > LIMIT_S:
        axis.axhline(LIMIT_S, color="#BBBBBB", lw=0.8, zorder=0)
    axis.set_xlim(0, None)
    axis.set_ylim(0, top_s)
    axis.legend(  # below: steep curves leave no room inside
        fontsize=6.5, frameon=False, title="reaches 0.5 s/token at" if len(crossings) else None, title_fontsize=6.5,
        loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2,
    )  # fmt: skip


CURVES = Panel(crossing_curves, f"{LATENCY}|{CROSSING}", "normalized latency, s/token", "request rate, req/s")
draw_curves = partial(drawn, panels=[CURVES], width=4.8, height=4.8)
