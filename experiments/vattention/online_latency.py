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

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvarena.errors import UserError
from kvarena.experiments.kit.cells import Cell, run_cells
from kvarena.experiments.kit.long_contexts import READS as READS
from kvarena.experiments.kit.long_contexts import (
    LongContexts,
    assumed_lengths,
    runs_of_long_contexts,
    unread_of_long_contexts,
)
from kvarena.experiments.kit.looks import looks
from kvarena.experiments.kit.panels import Panel, drawn, published_of
from kvarena.experiments.kit.published_models import by_model, model_columns, runs_by_model
from kvarena.experiments.kit.quantities import Quantity, rows
from kvarena.experiments.kit.replay import Replayer, Served, example_of, workload_of
from kvarena.harness.record.metrics import latencies
from kvarena.harness.record.metrics import summarize as scalar_metrics
from kvarena.harness.record.record import Frames, Measured, Recorder
from kvarena.harness.record.summary import SummaryRow
from kvarena.harness.requests.workload import Workload
from kvarena.harness.run.published import OURS, named
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System
from kvarena.harness.trace.arrival import UNDRAWN

HEADLINE = "request_latency_p50_vs_qps"
FIGURE = "fig10"
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
OTHERS = "others"  # models without rates of their own
LATENCIES = [Quantity(f"request_latency_{name}_vs_qps", "s", name, FIGURE) for name in QUANTILES]
BELOW = {"ttft_p99": "ttft_p99_s", "tbt_p99": "itl_p99_s", "request_latency_p50": "e2el_p50_s"}
OF_LOAD = {
    "capacity": [Quantity("capacity", "req/s", "rate")],
    "share": [Quantity(f"{name}_vs_share_of_capacity", "s", column) for name, column in BELOW.items()],
    "rate": [*LATENCIES, Quantity("rate_reached_vs_qps", "req/s", "rate_reached_per_s")],
}


@dataclass
class Params(LongContexts):
    """`params.*` of conf/experiment/online_latency.yaml; null there means: by the profile."""

    rates: dict[str, list[float]] = field(default_factory=dict)  # model, or `others` -> requests/s asked for
    shares: list[float] = field(default_factory=list)  # of each system's capacity, served too
    slower: list[float] = field(default_factory=list)  # modelled clock: factors on the time of every step, beside 1


def unread(run: Run[Params]) -> dict[str, str]:
    """Keys that this run does not read, and what to write instead."""
    keys = unread_of_long_contexts(run) | {"arrival.rate": "params.rates and params.shares ask for rates"}
    if run.clock == "measured":
        keys["params.slower"] = "clock=measured takes as long as it takes; it is for clock=modelled"
    models = {one.model.name for one in runs_by_model(run, run.params.models)}
    for name in run.params.rates.keys() - models - {OTHERS}:
        keys[f"params.rates.{name}"] = f"the models of this run are {', '.join(sorted(models))}"
    if models <= run.params.rates.keys():
        keys[f"params.rates.{OTHERS}"] = "every model of this run has rates of its own"
    if run.arrival.process in UNDRAWN:
        keys["arrival"] = (
            f"arrival={run.arrival.process} has no rate; arrival=poisson comes at those that are asked for"
        )
    return keys


def measure(run: Run[Params], recorder: Recorder) -> Measured:
    """Serve every rate and every share of capacity with every system, model by model."""
    _check(run)
    runs = runs_of_long_contexts(run)
    cells = [Cell(one.model.name, partial(_cell, one), model_columns(one)) for one in runs]
    notes = {"workload": example_of(runs[0], rate=1.0).provenance}
    return Measured(run_cells(run.experiment, recorder, cells), notes)


def _check(run: Run[Params]) -> None:
    params: Params = run.params
    for key in ("shares", "slower"):
        if any(not value > 0 for value in getattr(params, key)):
            raise UserError(f"params.{key}={list(getattr(params, key))}: takes numbers above 0")
    if not params.shares and not any(params.rates.values()):
        raise UserError("params.rates, params.shares: nothing to serve; name rates, or shares of capacity")


def _cell(run: Run[Params]) -> Frames:
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
    return quantiles | scalar_metrics(served.requests, served.steps, served.resumed_gaps_ps)


def summarize(run: Run[Params], frames: Frames) -> Iterator[SummaryRow]:
    """Fig 10, and what it hides, model by model."""
    for one, points in by_model(run, frames["points"]):
        for system in run.systems:
            own = points[points.system == system.name]
            for number in range(len(own)):
                yield from _point(one, system, own.iloc[[number]])


def _point(run: Run[Params], system: System, point: pd.DataFrame) -> Iterator[SummaryRow]:
    """What is said of one load; of a rate that was asked for also where all steps are longer."""
    load, factor, rate = point.iloc[0][["load", "factor", "rate"]]
    quantities, assuming = OF_LOAD[load], assumed_lengths(run)
    if load == "rate" and factor != 1:
        quantities = [each._replace(name=f"{each.name}:steps_{factor:g}x", figure=None) for each in LATENCIES]
        assuming = f"all steps take {factor:g} times as long"
    x = {"rate": rate, "share": factor}.get(load)
    return rows(quantities, point, partial(named, run, system, x=x, assuming=assuming))


def _quantiles(axis: Axes, ours: pd.DataFrame) -> None:
    """Four quantiles of each system at each rate: rings published, lines ours; dotted where all steps are longer."""
    styles, theirs = looks(ours), published_of(ours)
    for group, rate in enumerate(sorted(ours.x.unique())):
        for number, (label, look) in enumerate(styles.items()):
            place = group * (len(styles) + 1) + number
            here = ours[(ours.x == rate) & (ours.label == label)]
            stretched = here.quantity.str.contains(":")
            for shown, offset, style in ((here[~stretched], 0.0, "-"), (here[stretched], 0.25, ":")):
                axis.plot([place + offset] * len(shown), shown.value, style, marker="_", color=look.colour, ms=7)
            names = set(here.system[here.paper != OURS])
            dots = theirs[(theirs.x == rate) & theirs.system.isin(names)]
            axis.plot([place - 0.25] * len(dots), dots.value, "o", ms=4, mfc="none", color=look.colour)
            axis.text(place, 0.01, str(number + 1), transform=axis.get_xaxis_transform(), ha="center", fontsize=6)
    for number, look in enumerate(styles.values()):
        axis.plot([], [], marker=f"${number + 1}$", ls="none", color=look.colour, label=look.name)
    middle = (len(styles) - 1) / 2
    ticks = {
        group * (len(styles) + 1) + middle: f"{rate:g} req/s" for group, rate in enumerate(sorted(ours.x.unique()))
    }
    axis.set_xticks(list(ticks), list(ticks.values()))
    axis.set_yscale("log")
    axis.legend(fontsize=6, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncol=2)


def _below(axis: Axes, rows: pd.DataFrame) -> None:
    """TTFT solid, TBT dotted."""
    capacity = rows[rows.quantity == "capacity"].set_index("label").value
    for label, look in looks(rows).items():
        for quantity, style in (("ttft_p99", "-"), ("tbt_p99", ":")):
            line = rows[(rows.label == label) & (rows.quantity == f"{quantity}_vs_share_of_capacity")]
            said = f"{look.name}: capacity {capacity[label]:.3g}/s" if style == "-" else None
            axis.plot(
                100 * line.x, line.value, style, marker=look.marker, ms=4, mfc="none", color=look.colour, label=said
            )
    axis.set_yscale("log")
    axis.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)


PANELS = (
    Panel(_quantiles, "request_latency_.*_vs_qps.*", "s: p50, p90, p99, max",
          what="request latency; dotted: slower steps"),
    Panel(_below, "capacity|.*_vs_share_of_capacity", "s", "% of the system's capacity",
          "P99 of TTFT (solid) and TBT (dotted)"),
)  # fmt: skip


def draw(summary: pd.DataFrame) -> Figure:
    """Fig 10's latencies, and below them those at shares of the capacity where some were asked for."""
    shares = summary.quantity.str.endswith("_vs_share_of_capacity").any()
    return drawn(summary, PANELS if shares else PANELS[:1])
