"""Mapping beside the iteration before (vAttention Fig 12): what decode iterations take with it, and without.

    sync         page-groups are mapped in front of the iteration that needs them
    overlapped   beside the one before it (section 6.1.1)
    premapped    all at the start: what is left when mapping costs nothing

Measured, the three hold the same sequences and decode in turn, one iteration each. Modelled, they replay the requests
of a trace; there the GPUs of a model map side by side, or, in a fourth row that assumes so, one after the other, as
processes do that wait for one lock of the driver. Of what mapping costs, overlap hides

    hidden share = 1 - (T_overlapped - T_premapped) / (T_sync - T_premapped)

An event is an iteration before which sync maps; T is the median, over events, of the time of that iteration and of the
one before it, beside which overlap maps. Differences are taken event by event, since the machine's speed wanders.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvarena.errors import UserError
from kvarena.experiments.kit import plots
from kvarena.experiments.kit.cells import Cell, run_cells
from kvarena.experiments.kit.legend import swept
from kvarena.experiments.kit.long_contexts import assumed_lengths
from kvarena.experiments.kit.panels import published_of, title
from kvarena.experiments.kit.published_models import by_model, model_columns, runs_by_model, unread_models
from kvarena.experiments.kit.quantities import Quantity, rows
from kvarena.experiments.vattention.driver_calls import check_counts
from kvarena.experiments.vattention.mapped_system import the_system
from kvarena.experiments.vattention.overlap_cell import CHANGED, Params, Way, system_in
from kvarena.experiments.vattention.overlap_cell import measure as measured_batch
from kvarena.experiments.vattention.overlap_replay import replayed
from kvarena.harness.record.record import Frames, Measured, Recorder
from kvarena.harness.record.statistics import Estimate, median_interval
from kvarena.harness.record.summary import Names, SummaryRow, row
from kvarena.harness.run.published import label_of, named
from kvarena.harness.run.run import Run

LATENCY = "decode_iteration_latency"
HEADLINE = f"{LATENCY}_p99"
MARKS = ("p50", "p99", "max")
FIGURE = "fig12"
READS = {
    "modelled": ("model", "trace", "arrival", "decoding", "engine", "device", "systems"),
    "measured": ("model", "engine", "device", "systems", "threads"),
}
_IN_TURN = "the driver serves one GPU at a time, as processes wait for one lock"
_BATCH_ONLY = ("prompt_tokens", "cohorts", "stagger", "warmup_steps", "check_steps", "rounds")  # measured clock
COLOURS = dict(zip(Way, ("#D55E00", "#009E73", "#666666", "#E69F00"), strict=True))


def unread(run: Run[Params]) -> dict[str, str]:
    """Keys that this run does not read, and what to write instead."""
    keys = unread_models(run, run.params.gpus, "gpus") | {f"allocator.{each}": "the ways set it" for each in CHANGED}
    keys["allocator.deferred_reclamation"] = "rows are given back beside prompts, in iterations that do not count here"
    keys["device.unmap_us"] = keys["allocator.deferred_reclamation"]
    if run.clock == "modelled":
        keys |= {
            f"params.{each}": "clock=modelled replays a trace; clock=measured decodes batches" for each in _BATCH_ONLY
        }
        keys["scheduler.max_seqs"] = "params.max_batch sets it"
    else:
        keys["allocator.watermark"] = "the batch is resident from the start, and nobody waits for what would be left"
    return keys


def measure(run: Run[Params], recorder: Recorder) -> Measured:
    """Decode in all three ways: a few rounds for real, or one replay of each model."""
    _check(run)
    return Measured(run_cells(run.experiment, recorder, list(_cells(run))))


def _check(run: Run[Params]) -> None:
    params: Params = run.params
    the_system(run)
    counts = ["iterations", "max_batch", "max_tokens"]
    if run.clock == "measured":
        counts += ["prompt_tokens", "cohorts", "rounds"]
    check_counts(params, *counts)
    if run.clock == "measured" and (longest := max(params.prompts()) + params.steps + 2) > params.max_tokens:
        raise UserError(f"params.max_tokens={params.max_tokens}: the longest sequence gets to {longest}")


def _cells(run: Run[Params]) -> Iterator[Cell]:
    """One replay of each model, or the rounds."""
    if run.clock == "modelled":
        for one in runs_by_model(run, run.params.gpus):
            yield Cell(f"{one.model.name}-0", partial(replayed, one), {"round": 0, **model_columns(one)})
        return
    from kvarena.harness.model.build import build_model

    model = build_model(run.model, run.device.kind)
    for number in range(run.params.rounds):
        measure_round = partial(measured_batch, run, model, number)
        yield Cell(f"{run.model.name}-{number}", measure_round, {"round": number, **model_columns(run)})


def summarize(run: Run[Params], frames: Frames) -> Iterator[SummaryRow]:
    """Fig 12, the iterations one by one, the driver's calls, and what overlap hides."""
    calls = {one.model.name: table for one, table in by_model(run, frames["driver_calls"])}
    for one, steps in by_model(run, frames["iterations"]):
        yield from _rows(one, steps, calls[one.model.name])


def _rows(run: Run[Params], steps: pd.DataFrame, calls: pd.DataFrame) -> Iterator[SummaryRow]:
    table = events(steps)
    for way in (way for way in Way if way in set(steps.way)):
        own = steps[steps.way == way]
        yield from _latency_rows(run, way, own)
        yield from _mapping_rows(run, way, own, calls[calls.way == way], table.index)
    yield from _event_rows(run, table)


def _latency_rows(run: Run[Params], way: Way, own: pd.DataFrame) -> Iterator[SummaryRow]:
    """Fig 12: percentiles and spikes of every round, and the iterations one by one: all rounds map in the same ones."""
    latencies, spike_ms = own.groupby("round").latency_ms, run.params.spike_ms
    spikes = latencies.apply(lambda ms: int((ms > ms.median() + spike_ms).sum()))
    by_round = {"p50": latencies.median(), "p99": latencies.quantile(0.99), "max": latencies.max(), "spikes": spikes}
    quantities = [Quantity(f"{LATENCY}_{mark}", "ms", mark, FIGURE) for mark in MARKS]
    quantities.append(Quantity(f"spikes_over_{spike_ms:g}ms_above_median", "count", "spikes", FIGURE))
    yield from rows(quantities, pd.DataFrame(by_round), partial(_names, run, way))
    for iteration, ms in own.groupby("iteration").latency_ms:
        names = _names(run, way, x=float(str(iteration)))
        yield row(median_interval(ms), quantity="decode_iteration_latency_vs_iteration", unit="ms", **names)


def _mapping_rows(
    run: Run[Params], way: Way, own: pd.DataFrame, calls: pd.DataFrame, events_at: pd.Index
) -> Iterator[SummaryRow]:
    """Driver calls by where they are made, and what an event's own iteration waits for them."""
    counts = {f"{key}_driver_calls": calls[key].sum() for key in ("critical", "background")}
    counts["iterations_after_mapping"] = (own.actions > 0).sum()
    for quantity, count in counts.items():
        yield row(float(count), quantity=quantity, unit="count", **_names(run, way, counted=True))
    waits = own[own.set_index(["round", "iteration"]).index.isin(events_at)].stall_ms
    if len(waits):
        yield row(median_interval(waits), quantity="wait_for_mapping", unit="ms", **_names(run, way))


def _event_rows(run: Run[Params], table: pd.DataFrame) -> Iterator[SummaryRow]:
    """What an event adds in either way, the height of Fig 12's spikes, and how much of it overlap hides."""
    if table.empty:
        return
    for way in (Way.SYNC, Way.OVERLAPPED):
        added = median_interval(table[way] - table[Way.PREMAPPED])
        yield row(added, quantity="added_latency_of_mapping", unit="ms", **_names(run, way))
    share = hidden_share(table)
    if not np.isnan(share.median):
        yield row(share, quantity="hidden_share", unit="%", **_names(run, Way.OVERLAPPED))


def _names(
    run: Run[Params], way: Way, figure: str | None = None, x: float | None = None, counted: bool = False
) -> Names:
    """What a row is called: the paper's two ways are one system, mapped in either."""
    system = the_system(run)
    return named(
        run, system, figure, key=way.value, label=label_of(run, system_in(way, system)), x=x, counted=counted,
        assuming=_IN_TURN if way is Way.IN_TURN else assumed_lengths(run),
    )  # fmt: skip


def events(steps: pd.DataFrame) -> pd.DataFrame:
    """Milliseconds of each event by way: the iteration that sync maps for, and the one before."""
    latency = steps.pivot(index=["round", "iteration"], columns="way", values="latency_ms")
    maps = steps[steps.way == Way.SYNC].set_index(["round", "iteration"]).actions.reindex(latency.index) > 0
    return (latency + latency.groupby("round").shift(1))[maps].dropna()


def hidden_share(table: pd.DataFrame, resamples: int = 2000) -> Estimate:
    """In percent; the interval is a bootstrap over events. Without a cost to hide it is NaN."""
    added = table[[Way.SYNC, Way.OVERLAPPED]].sub(table[Way.PREMAPPED], axis=0).to_numpy()  # [events, 2]

    def share(sample: np.ndarray) -> np.ndarray:
        sync, overlapped = np.moveaxis(np.median(sample, axis=-2), -1, 0)
        return np.where(sync > 0, 100 * (1 - overlapped / np.where(sync > 0, sync, 1)), np.nan)

    if np.isnan(share(added)):
        return Estimate(np.nan, len(added), np.nan, np.nan)
    draws = np.random.default_rng(0).integers(0, len(added), (resamples, len(added)))
    low, high = np.nanpercentile(share(added[draws]), [2.5, 97.5])
    return Estimate(float(share(added)), len(added), float(low), float(high))


def draw(summary: pd.DataFrame) -> Figure:
    """Latency over iterations, one panel for each way; P50, P99 and the longest, ours and the published."""
    series = summary[summary.quantity == "decode_iteration_latency_vs_iteration"]
    setups, columns = list(series.groupby("setup", sort=False)), 1 + series.label.nunique()
    figure, axes = plots.canvas(len(setups), columns, width=4)
    for number, (setup, table) in enumerate(setups):
        line = axes[number * columns : (number + 1) * columns]
        for axis, (label, own) in zip(line, table.groupby("label", sort=False), strict=False):
            axis.plot(own.x, own.value, lw=0.8, color=COLOURS[_way_of(str(label))])
            axis.set(xlabel="decode iteration", ylabel="ms", ylim=(0, 1.05 * table.value.max()))
            title(axis, own, f"{_way_of(str(label))}{swept(own).iloc[0]}")
        ours = summary[(summary.setup == setup) & summary.quantity.isin([f"{LATENCY}_{mark}" for mark in MARKS])]
        _tails(line[-1], ours, published_of(ours))
    figure.tight_layout()
    return figure


def _way_of(label: str) -> Way:
    return next(way for way in reversed(Way) if way.value in label)


def _tails(axis: Axes, ours: pd.DataFrame, theirs: pd.DataFrame) -> None:
    """Bars of P50, P99 and the longest; dashes are the published values."""
    labels = list(ours.groupby("label", sort=False))
    published = theirs.set_index(["system", "quantity"]).value
    for number, (label, own) in enumerate(labels):
        places = [i + 0.8 * ((number + 0.5) / len(labels) - 0.5) for i in range(len(MARKS))]
        way, here = _way_of(str(label)), own.set_index("quantity").value
        said = f"{way}{swept(own).iloc[0]}"
        heights = [here[f"{LATENCY}_{mark}"] for mark in MARKS]
        axis.bar(places, heights, 0.75 / len(labels), color=COLOURS[way], label=said)
        values = [published.get((way, f"{LATENCY}_{mark}"), np.nan) for mark in MARKS]
        axis.plot(places, values, "k_", ms=12, mew=2, label="published" if number == 0 and len(theirs) else None)
    axis.set_xticks(range(len(MARKS)), ["P50", "P99", "longest"])
    axis.set(ylabel="ms", ylim=(0, 1.4 * max([*ours.value, *theirs.value[theirs.unit == "ms"]])))
    title(axis, ours, "latency of an iteration")
    axis.legend(fontsize=7, frameon=False, ncols=2, loc="upper left")
