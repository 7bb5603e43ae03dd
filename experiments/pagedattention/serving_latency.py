"""Normalized latency against request rate (PagedAttention Fig 12), and the highest rate that is sustained.

Where the published points are withheld there are none to replay: the curve is then drawn around the rate at which it
crosses the limit.

The published points are one replay each, with the artifact's seed. So are the rows that carry their names; those over
all seeds are ours. A search is of the first seed.
"""

from collections.abc import Callable, Iterator
from functools import partial

import pandas as pd
from matplotlib.axes import Axes

from kvarena.experiments.kit import plots
from kvarena.experiments.kit.cells import Cell, run_cells
from kvarena.experiments.kit.latency_curve import (
    BRACKET,
    CROSSING,
    LATENCY,
    LIMIT_S,
    chosen_panels,
    crossing_of,
    unread_panels,
    unread_traces,
)
from kvarena.experiments.kit.latency_error import log_errors, rms
from kvarena.experiments.kit.panels import Panel, curves, drawn, title
from kvarena.experiments.kit.quantities import columns, rows
from kvarena.experiments.kit.reads import reads
from kvarena.experiments.kit.replay import Served, example_of, workload_of
from kvarena.experiments.kit.seeds import seed_rows, unread_seeds
from kvarena.experiments.pagedattention.serving_panels import (
    PADDED,
    Curve,
    LatencyPanel,
    Params,
    curves_of,
    out_of_sample,
    run_of_panel,
)
from kvarena.harness.record.capacity import capacity, crossing
from kvarena.harness.record.metrics import latencies
from kvarena.harness.record.metrics import summarize as metrics_of
from kvarena.harness.record.record import Frames, Measured, Recorder
from kvarena.harness.record.statistics import median_interval
from kvarena.harness.record.summary import SummaryRow, row
from kvarena.harness.run.published import is_earned, named
from kvarena.harness.run.run import Run

HEADLINE = LATENCY
READS = reads()
AROUND = (0.25, 0.5, 0.75, 0.9, 0.97, 1.03)  # of the crossing: where an unpublished curve is drawn
OUT_OF_SAMPLE = f"{HEADLINE}:out_of_sample"


def unread(run: Run[Params]) -> dict[str, str]:
    """Keys that this run does not read, and what to write instead."""
    params: Params = run.params
    panels = chosen_panels(params.panels, params.only)
    rules = unread_seeds(run)
    rules |= {"arrival.rate": "the panels name the rates: params.panels={FIGURE: {rates: {SYSTEM: [...]}, ...}}"}
    rules |= {"arrival.duration_s": "the panels say how long: params.panels={FIGURE: {duration_s: SECONDS, ...}}"}
    for group in ("model", "device"):
        if all(getattr(panel, group) for panel in panels.values()):
            rules[group] = f"every panel names its own: params.panels={{FIGURE: {{{group}: NAME, ...}}}}"
    traces = [panel.trace for panel in panels.values()]
    rules |= unread_traces(run, traces, "params.panels={FIGURE: {trace: NAME, ...}}", of_all=("max_tokens",))
    if params.paths.get(run.trace.name):
        rules["trace.path"] = f"params.paths.{run.trace.name} is given"
    for trace in set(params.paths) - set(traces):
        rules[f"params.paths.{trace}"] = "no panel of this run has that trace"
    return rules | unread_panels(params.panels, params.only) | _unread_of_systems(run, panels)


def _unread_of_systems(run: Run[Params], panels: dict[str, LatencyPanel]) -> dict[str, str]:
    """Keys for some systems alone."""
    params, rules = run.params, dict[str, str]()
    there = {system.name for system in run.systems}
    padded = any(system.allocator.name == PADDED for system in run.systems)
    for figure, panel in panels.items():
        if panel.batch_size is not None and padded:
            rules["allocator.batch_size"] = "the panels set it: params.panels={FIGURE: {batch_size: N, ...}}"
        if not padded:
            for key in ("batch_size", "fastertransformer_duration_s"):
                rules[f"params.panels.{figure}.{key}"] = "FasterTransformer is not among the systems of this run"
        for key in {*panel.rates, *panel.guess} - {*there, "others"}:
            for which in ("rates", "guess"):
                rules[f"params.panels.{figure}.{which}.{key}"] = "no system of this run has that name"
    searched = set(params.crossing) & there or not all(p.rates_of(s) for p in panels.values() for s in run.systems)
    if not searched:
        for key in ("params.tolerance", *(f"params.panels.{figure}.guess" for figure in panels)):
            rules[key] = "no crossing is searched: params.crossing=[SYSTEM] searches one"
    if absent := set(params.crossing) - there:
        rules["params.crossing"] = f"{', '.join(sorted(absent))}: not among the systems of this run"
    if params.once and (len(params.seeds) == 1 or not set(params.once) & there):
        rules["params.once"] = "every system is replayed once; params.seeds=[0,1,2,3,4,5] has more seeds"
    if params.out_of_sample and not any(systems for *_, systems in out_of_sample(run, _runs(run))):
        rules["params.out_of_sample"] = "its engines were fitted on no system, model and device of this run"
    return rules


def _runs(run: Run[Params]) -> dict[str, Run[Params]]:
    return {f: run_of_panel(run, panel) for f, panel in chosen_panels(run.params.panels, run.params.only).items()}


def measure(run: Run[Params], recorder: Recorder) -> Measured:
    """Replay every point of every curve, and again for every seed."""
    panels = chosen_panels(run.params.panels, run.params.only)
    cells = [
        Cell(f"{curve.key}-{seed}", partial(_points, curve, seed),
             {"curve": curve.key, "seed": seed, "engine": curve.run.engine.name})
        for curve in curves_of(run, panels) for seed in curve.seeds
    ]  # fmt: skip
    frames = run_cells(run.experiment, recorder, cells)
    workloads = {
        figure: example_of(own, seed=run.params.seeds[0], rate=1.0, duration_s=panels[figure].duration_s).provenance
        for figure, own in _runs(run).items()
    }
    return Measured(frames, {"workloads": workloads})


def _points(curve: Curve, seed: int) -> Frames:
    """Every point of the curve under one seed, a row each; two of kind `bracket` lie around the crossing."""
    known: dict[float, dict[str, float]] = {}

    def at(rate: float) -> dict[str, float]:
        if rate not in known:
            workload = workload_of(curve.run, seed=seed, rate=rate, duration_s=curve.duration_s)
            known[rate] = _metrics(curve.replayer.serve(curve.system, workload))
        return known[rate]

    rates, bracket = curve.rates, list[float]()
    if curve.searched and seed == curve.seeds[0]:
        bracket = _bracket(curve, lambda rate: at(rate)["normalized_latency_s"])
        low, high = ((rate, at(rate)["normalized_latency_s"]) for rate in bracket)
        at_limit = crossing(low, high, LIMIT_S)
        rates = rates or [float(f"{at_limit * share:.3g}") for share in AROUND]
    kinds = [("point", rate) for rate in rates] + [(BRACKET, rate) for rate in bracket]
    return {"points": pd.DataFrame([{"kind": kind, "rate": rate, **at(rate)} for kind, rate in kinds])}


def _bracket(curve: Curve, latency_at: Callable[[float], float]) -> list[float]:
    guesses, rates = curve.panel.guess, curve.rates
    guess = guesses.get(curve.system.name) or guesses.get("others") or (rates[-1] if rates else 1.0)
    return list(capacity(latency_at, LIMIT_S, guess, curve.run.params.tolerance))


def normalized_latency_s(requests: pd.DataFrame) -> float:
    """Mean of E2E latency / output tokens, in s/token: the paper's metric."""
    return float(latencies(requests).normalized_s.mean())


def _metrics(served: Served) -> dict[str, float]:
    steps, iterations = served.steps, float(served.steps.steps.sum())
    batch = float((steps.requests * steps.steps).sum()) / iterations
    more = {"mean_batched_requests": batch, "clock_events_per_step": len(steps) / iterations}
    return metrics_of(served.requests, steps, served.resumed_gaps_ps) | more


# Our own quantities at every point, and their units; docs/metrics.md has the formulas.
OURS = columns({
    "ttft_p50_s": "s", "ttft_p99_s": "s", "tpot_p50_s": "s", "tpot_p99_s": "s", "itl_p50_s": "s", "itl_p99_s": "s",
    "e2el_p50_s": "s", "e2el_p99_s": "s", "queueing_p50_s": "s", "queueing_p99_s": "s", "stall_mean_s": "s",
    "rate_asked_per_s": "req/s", "rate_reached_per_s": "req/s", "output_tokens_per_s": "tok/s",
    "mean_batched_requests": "requests", "preemptions": "count", "refused": "count", "finished": "count",
    "clock_events_per_step": "ratio",
}, "_vs_rate")  # fmt: skip


def summarize(run: Run[Params], frames: Frames) -> Iterator[SummaryRow]:
    """The paper's rows of seed 0, ours of every rate over the seeds, and how far the paper's points are missed."""
    points = frames["points"]
    every = curves_of(run, chosen_panels(run.params.panels, run.params.only))
    of_curve = [(curve, points[points.curve == curve.key]) for curve in every]
    for curve, its in of_curve:
        yield from _crossing_rows(curve, its)
        yield from _point_rows(curve, its)
    yield from _errors(run, of_curve)


def _crossing_rows(curve: Curve, points: pd.DataFrame) -> Iterator[SummaryRow]:
    at_limit = crossing_of(points)
    if at_limit is None:
        return
    seed = int(points[points.kind == BRACKET].seed.iloc[0])
    names = [curve.ours(fitted=curve.was_fitted()), curve.published(seed)]
    for each in names if is_earned(names[1]) else names[:1]:
        yield row(at_limit, quantity=CROSSING, unit="req/s", **each)


def _point_rows(curve: Curve, points: pd.DataFrame) -> Iterator[SummaryRow]:
    """A curve out of sample has its latency alone, under a name of its own beside the calibrated one."""
    for rate, by_seed in points[points.kind == "point"].groupby("rate", sort=False):
        x = float(rate)  # type: ignore[arg-type]
        latency_s, ours = by_seed.set_index("seed").normalized_latency_s, curve.ours(fitted=curve.was_fitted(x), x=x)
        if curve.out_of_sample:
            yield row(median_interval(latency_s), quantity=OUT_OF_SAMPLE, unit="s/token", **ours)
            continue
        yield from seed_rows(latency_s, ours, curve.published(0, x), quantity=HEADLINE, unit="s/token")
        yield from rows(OURS, by_seed, partial(named, curve.run, curve.system, detail=curve.detail, x=x))


def _errors(run: Run[Params], of_curve: list[tuple[Curve, pd.DataFrame]]) -> Iterator[SummaryRow]:
    """RMS of log(ours / published), of each family of curves, and of all of one engine where there are several.

    Of curves that stand for published ones, and of those out of sample; seed 0 alone.
    """
    points = pd.DataFrame(list(_compared(of_curve)))
    if points.empty:
        return
    for (figure, engine), of_engine in points.groupby(["figure", "engine"], sort=False):
        errors = log_errors(of_engine, str(figure))
        groups = {str(name): rows.index for name, rows in of_engine.groupby("family", sort=False)}
        if len(groups) > 1:
            groups["all systems"] = of_engine.index
        for name, index in groups.items():
            of_group = errors[errors.index.isin(index)]
            if len(of_group):
                first = points.loc[of_group.index[0]]
                names = named(first.run, None, label=f"{name}/{engine}", detail=first.detail, fitted=first.fitted)
                yield row(rms(of_group), quantity="rms_log_error", unit="%", **names)


def _compared(of_curve: list[tuple[Curve, pd.DataFrame]]) -> Iterator[dict[str, object]]:
    for curve, points in of_curve:
        for _, point in points[(points.kind == "point") & (points.seed == 0)].iterrows():
            x = float(point.rate)
            at = curve.beside(x)
            if at is not None and (curve.out_of_sample or is_earned(curve.published(0, x))):
                yield {"figure": at.figure, "panel": at.panel, "system": at.system, "x": x,
                       "value": point.normalized_latency_s, "family": at.system.partition("(")[0],
                       "engine": curve.run.engine.name, "run": curve.run, "detail": curve.detail,
                       "fitted": curve.was_fitted(x)}  # fmt: skip


def latency_panel(axis: Axes, ours: pd.DataFrame) -> None:
    """The curves of one setup; the axis ends at 1 s/token, as the paper's does, or where the curves end."""
    drawn_through, crosses = ours[ours.quantity == HEADLINE], ours[ours.quantity == OUT_OF_SAMPLE]
    curves(axis, drawn_through)
    for allocator, points in crosses.groupby("allocator", sort=False):
        axis.plot(points.x, points.value, "x", color=plots.colour_of(str(allocator)), ms=4)
    lines = "lines: median over seeds, with its 95 % interval; thin: seed 0" if drawn_through.n.max() > 1 else ""
    title(axis, drawn_through, "", lines, "crosses: constants of the others' curves" if len(crosses) else "")
    axis.set_xlim(0, None)
    axis.set_ylim(0, min(1.0, 1.1 * drawn_through.value.max()))


CURVES = Panel(latency_panel, f"{HEADLINE}|{OUT_OF_SAMPLE}", "normalized latency, s/token", "request rate, req/s",
               legend=False)  # fmt: skip
draw = partial(drawn, panels=[CURVES], one_legend=True)
