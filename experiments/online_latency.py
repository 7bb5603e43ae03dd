"""Online latency on long prompts (vAttention Fig 10), and what it hides: TTFT and TBT below each system's capacity.

    request latency   from arrival to the last token; quantiles over requests
    capacity          requests/s served where all of them wait at the door
    TBT               time between two tokens of one request (ITL); it holds the prefills of others

The paper's rates lie near capacity, where latency multiplies every error of the service time: `params.slower` makes
all steps longer, to show by how much.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvarena.errors import UserError
from kvarena.experiments import plots
from kvarena.experiments.long_contexts import CONDITION, by_system, evidence, runs_of_long_contexts
from kvarena.experiments.replay import Replayer, Served, workload_of
from kvarena.harness.metrics import latencies, summarize
from kvarena.harness.progress import Progress
from kvarena.harness.record import Frames, Outcome, Recorder
from kvarena.harness.run import Run
from kvarena.harness.summary import SummaryRow, frame, published_values, row
from kvarena.harness.workload import Workload

NAME = "online_latency"
HEADLINE = "request_latency_p50_vs_qps"
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
OTHERS = "others"  # models without rates of their own
BELOW = {"ttft_p99_s": "ttft_p99", "itl_p99_s": "tbt_p99", "e2el_p50_s": "request_latency_p50"}


@dataclass
class Params:
    """`params.*` of conf/experiment/online_latency.yaml; null there means: by the profile."""

    models: dict[str, int] = field(default_factory=dict)  # name -> tensor-parallel degree
    rates: dict[str, list[float]] = field(default_factory=dict)  # model, or `others` -> requests/s asked for
    shares: list[float] = field(default_factory=list)  # of each system's capacity, served too
    slower: list[float] = field(default_factory=list)  # modelled clock: factors on the time of every step, beside 1
    context: int | None = None  # tokens of the longest sequence; null: the model's
    memory_share: float = 0.9  # of a device's memory, for weights, activations and K/V
    pool_bytes: int | None = None  # of K/V on one device; null: what memory_share leaves


def run(run: Run, recorder: Recorder) -> Outcome:
    """Serve every rate and every share of capacity with every system, model by model."""
    _check(run)
    rows: list[SummaryRow] = []
    tables: list[pd.DataFrame] = []
    runs = runs_of_long_contexts(run)
    notes = {"lengths": CONDITION, "workload": workload_of(runs[0], rate=1.0).provenance}
    with Progress(NAME, len(runs)) as progress:
        for one in runs:
            progress.stage(one.model.name)
            points = recorder.cell(one.model.name, partial(_cell, one))["points"]
            tables.append(points.assign(model=one.model.name))
            rows += _rows(one, points)
            progress.advance()
    summary = frame(rows)
    nothing = pd.DataFrame({"model": pd.Series(dtype=str)})
    return Outcome(summary, nothing, pd.concat(tables, ignore_index=True), HEADLINE, draw(summary), notes)


def _check(run: Run) -> None:
    params: Params = run.params
    for key in ("shares", "slower"):
        if any(not value > 0 for value in getattr(params, key)):
            raise UserError(f"params.{key}={list(getattr(params, key))}: takes numbers above 0")
    if params.slower and run.clock == "measured":
        raise UserError("params.slower: clock=measured takes as long as it takes; it is for clock=modelled")
    if not params.shares and not any(params.rates.values()):
        raise UserError("params.rates, params.shares: nothing to serve; name rates, or shares of capacity")


def _cell(run: Run) -> Frames:
    """A row for every system and load."""
    params: Params = run.params
    replayer = Replayer(run)
    rates = params.rates.get(run.model.name, params.rates.get(OTHERS, []))
    points = []
    for system in run.systems:
        serve = partial(replayer.serve, system)
        all_at_once = serve(_at_once(workload_of(run, rate=1.0)))
        capacity = _metrics(all_at_once)["rate_reached_per_s"]
        loads = [("rate", factor, rate) for factor in (1.0, *params.slower) for rate in rates]
        loads += [("share", share, share * capacity) for share in params.shares]
        points.append({"system": system.name, "load": "capacity", "factor": 1.0, "rate": capacity})
        for load, factor, rate in loads:
            stretch = factor if load == "rate" else 1.0
            served = serve(workload_of(run, rate=rate * stretch))
            times = {name: value * stretch for name, value in _metrics(served).items()}
            points.append({"system": system.name, "load": load, "factor": factor, "rate": rate, **times})
    return {"points": pd.DataFrame(points)}


def _at_once(workload: Workload) -> Workload:
    return replace(workload, arrival_ps=0 * workload.arrival_ps)


def _metrics(served: Served) -> dict[str, float]:
    """Quantiles of request latency, and every scalar metric. Where all steps take f times as long, and requests come
    at a rate f times lower, the same happens f times slower: so the caller stretches times instead of steps."""
    e2el_s = latencies(served.requests).e2el_s
    quantiles = {name: float(e2el_s.quantile(q)) for name, q in QUANTILES.items()}
    return quantiles | summarize(served.requests, served.steps, served.resumed_gaps_ps)


def _rows(run: Run, points: pd.DataFrame) -> Iterator[SummaryRow]:
    for system, shared in by_system(run, NAME):
        for point in points[points.system == system.name].to_dict("records"):
            yield from _point(run, point, shared)


def _point(run: Run, point: dict[Any, Any], shared: dict[str, Any]) -> Iterator[SummaryRow]:
    """Fig 10's quantiles at a rate; or our own at a share of capacity."""
    ours = {"paper": "kvarena", "figure": NAME, **shared}
    kind = evidence(run, "fig10", shared)
    if point["load"] == "capacity":
        yield row(point["rate"], quantity="capacity", unit="req/s", evidence=kind, **ours)
    elif point["load"] == "share":
        at = {**ours, "x": point["factor"], "evidence": kind}
        for metric, quantity in BELOW.items():
            yield row(point[metric], quantity=f"{quantity}_vs_share_of_capacity", unit="s", **at)
    elif point["factor"] == 1:
        at = {**shared, "x": point["rate"], "evidence": kind, "paper": "vattention", "figure": "fig10"}
        for name in QUANTILES:
            yield row(point[name], quantity=f"request_latency_{name}_vs_qps", unit="s", **at)
        yield row(point["rate_reached_per_s"], quantity="rate_reached_vs_qps", unit="req/s", evidence=kind,
                  x=point["rate"], **ours)  # fmt: skip
    else:
        at = {**ours, "x": point["rate"], "evidence": "conditional"}
        for name in QUANTILES:
            quantity = f"request_latency_{name}_vs_qps:steps_{point['factor']:g}x"
            yield row(point[name], quantity=quantity, unit="s", **at)


def draw(summary: pd.DataFrame) -> Figure:
    """Above, request latency at the paper's rates, ours over published; below, P99 of TTFT and TBT under capacity."""
    published = published_values("vattention", figure="fig10")
    panels = list(dict.fromkeys(summary.panel))
    rated = summary[summary.quantity.str.startswith("request_latency_") & summary.quantity.str.contains("_vs_qps")]
    figure, axes = plots.canvas(2 if len(rated) else 1, len(panels), width=5)
    for number, panel in enumerate(panels):
        if len(rated):
            _quantiles(axes[number], rated[rated.panel == panel], published[published.panel == panel])
        _below(axes[number - len(panels)], summary[summary.panel == panel])
    figure.tight_layout()
    return figure


def _quantiles(axis: Axes, ours: pd.DataFrame, theirs: pd.DataFrame) -> None:
    """Four quantiles of each system at each rate: dots published, lines ours; dashed where all steps are longer."""
    systems = [name for name in dict.fromkeys(ours.system) if name in plots.PAPER_COLOURS]
    places: dict[tuple[float, str], float] = {}
    ticks: list[tuple[float, float]] = []
    for rate in sorted(ours.x.unique()):
        for name in systems:
            places[rate, name] = float(len(places) + len(ticks))
        ticks.append((rate, places[rate, systems[0]]))
    for (rate, name), place in places.items():
        colour = plots.PAPER_COLOURS[name]
        here = ours[(ours.x == rate) & (ours.system == name)].set_index("quantity").value
        for suffix, offset, style in (("", 0.0, "-"), (":steps_", 0.25, ":")):
            keys = [k for k in here.index if (":" in k) == bool(suffix)]
            if keys:
                axis.plot([place + offset] * len(keys), here[keys], style, marker="_", color=colour, ms=7)
        dots = theirs[(theirs.x == rate) & (theirs.system == name)]
        axis.plot([place - 0.25] * len(dots), dots.value, "o", ms=4, mfc="none", color=colour)
    for name in systems:
        axis.plot([], [], color=plots.PAPER_COLOURS[name], label=name)
    axis.set_xticks([place + 1 for _, place in ticks], [f"{rate:g} req/s" for rate, _ in ticks])
    axis.set(ylabel="request latency, s: p50, p90, p99, max", yscale="log")
    axis.set_title(
        f"{ours.panel.iloc[0]}: {ours.device.iloc[0]}, {ours.clock.iloc[0]}\no published, - ours, : slower steps"
    )
    axis.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncol=3)


def _below(axis: Axes, rows: pd.DataFrame) -> None:
    capacity = rows[rows.quantity == "capacity"].set_index("system").value
    for (name, mine), marker in zip(rows.groupby("system", sort=False), plots.MARKERS, strict=False):
        colour = plots.PAPER_COLOURS.get(str(name)) or plots.COLOURS[mine.allocator.iloc[0]]
        for quantity, style in (("ttft_p99", "-"), ("tbt_p99", ":")):
            line = mine[mine.quantity == f"{quantity}_vs_share_of_capacity"]
            label = f"{name}: capacity {capacity[name]:.3g}/s" if style == "-" else None
            axis.plot(100 * line.x, line.value, style, marker=marker, ms=4, mfc="none", color=colour, label=label)
    axis.set(xlabel="% of the system's capacity", ylabel="s", yscale="log")
    axis.set_title(
        f"{rows.panel.iloc[0]}: P99 of TTFT (solid) and TBT (dotted)\n{rows.device.iloc[0]}, {rows.clock.iloc[0]}"
    )
    axis.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.3), frameon=False)
