"""Mapping beside the iteration before (vAttention Fig 12): what decode iterations take with it, and without.

    sync         page-groups are mapped in front of the iteration that needs them
    overlapped   beside the one before it (section 6.1.1)
    premapped    all at the start: what is left when mapping costs nothing

Measured, the three hold the same sequences and decode in turn, one iteration each. Modelled, they replay requests with
the lengths of the paper's trace; there the GPUs of a model map side by side, or, in a fourth row that assumes so, one
after the other, as processes do that wait for one lock of the driver. Of what mapping costs, overlap hides

    hidden share = 1 - (T_overlapped - T_premapped) / (T_sync - T_premapped)

An event is an iteration before which sync maps; T is the median, over events, of the time of that iteration and of the
one before it, beside which overlap maps. Differences are taken event by event, since the machine's speed wanders.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvarena.errors import UserError
from kvarena.experiments import plots
from kvarena.experiments.mapping import the_system
from kvarena.experiments.overlap_cell import Way, measure, system_in
from kvarena.experiments.overlap_replay import replayed
from kvarena.experiments.replay import columns
from kvarena.harness.progress import Progress
from kvarena.harness.record import Frames, Outcome, Recorder
from kvarena.harness.run import Run
from kvarena.harness.statistics import Estimate, median_interval
from kvarena.harness.summary import SummaryRow, frame, published_values, row

NAME = "allocation_overlap"
HEADLINE = "decode_iteration_latency_p99"
COLOURS = dict(zip(Way, ("#D55E00", "#009E73", "#666666", "#E69F00"), strict=True))


@dataclass
class Params:
    """`params.*` of conf/experiment/allocation_overlap.yaml; null there means: by the profile."""

    iterations: int = 0  # decode-only iterations that count
    max_batch: int = 0
    max_tokens: int = 0  # longest sequence
    spike_ms: float = 0.0  # above the median: a spike
    # measured clock
    prompt_tokens: int = 0  # of the shortest sequence
    cohorts: int = 1  # the sequences of a cohort are equally long, and grow in the same iteration
    stagger: int = 0  # tokens from one cohort to the next
    warmup_steps: int = 0
    check_steps: int = 0  # steps whose logits must agree before anything is timed
    rounds: int = 1  # batches, each in fresh memory: the samples of every interval
    # modelled clock
    tp: int = 1  # GPUs
    requests: int = 0  # all there at the start
    replay_prompts: list[int] = field(default_factory=list)  # shortest and longest, drawn evenly
    replay_outputs: list[int] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Tokens that every sequence of a measured batch decodes."""
        return self.warmup_steps + self.check_steps + self.iterations

    def prompts(self) -> list[int]:
        """Lengths of a measured batch."""
        return [self.prompt_tokens + self.stagger * (i % self.cohorts) for i in range(self.max_batch)]


def run(run: Run, recorder: Recorder) -> Outcome:
    """Decode in all three ways and compare."""
    params: Params = run.params
    _check(run)
    frames: list[Frames] = []
    with Progress(NAME, params.rounds) as progress:
        for number, cell in enumerate(_cells(run)):
            progress.stage(f"round {number}")
            frames.append({name: t.assign(round=number) for name, t in recorder.cell(f"{number}", cell).items()})
            progress.advance()
    steps, calls = (pd.concat([f[name] for f in frames], ignore_index=True) for name in ("steps", "calls"))
    summary = frame(_summary(run, steps, calls))
    return Outcome(summary, calls, steps, HEADLINE, draw(summary))


def _check(run: Run) -> None:
    params: Params = run.params
    the_system(run)
    counts = ("iterations", "max_batch", "prompt_tokens", "cohorts", "rounds")
    if run.clock == "modelled":
        counts = ("iterations", "max_batch", "requests", "tp", "rounds")
        for key in ("replay_prompts", "replay_outputs"):
            bounds = getattr(params, key)
            if len(bounds) != 2 or not 1 <= bounds[0] <= bounds[1]:
                raise UserError(f"params.{key}={bounds}: a shortest and a longest length are needed, [low, high]")
    for key in counts:
        if getattr(params, key) < 1:
            raise UserError(f"params.{key}={getattr(params, key)}: at least 1 is needed")
    if run.clock == "measured" and (longest := max(params.prompts()) + params.steps + 2) > params.max_tokens:
        raise UserError(f"params.max_tokens={params.max_tokens}: the longest sequence gets to {longest}")


def _cells(run: Run) -> Iterator[Any]:
    """What each round measures; a modelled run has one."""
    if run.clock == "modelled":
        yield partial(replayed, run)
        return
    from kvarena.harness.model.build import build_model

    model = build_model(run.model, run.device.kind)
    for number in range(run.params.rounds):
        yield partial(measure, run, model, number)


def _summary(run: Run, steps: pd.DataFrame, calls: pd.DataFrame) -> Iterator[SummaryRow]:
    table = events(steps)
    for way in (way for way in Way if way in set(steps.way)):
        own = steps[steps.way == way]
        yield from _latency_rows(run, way, own)
        yield from _mapping_rows(run, way, own, calls[calls.way == way], table.index)
    yield from _event_rows(run, table)


def _latency_rows(run: Run, way: Way, own: pd.DataFrame) -> Iterator[SummaryRow]:
    """Fig 12: percentiles and spikes of every round, and the iterations one by one: all rounds map in the same ones."""
    latencies, spike_ms = own.groupby("round").latency_ms, run.params.spike_ms
    spikes = latencies.apply(lambda ms: int((ms > ms.median() + spike_ms).sum()))
    for quantity, samples, unit in (
        ("decode_iteration_latency_p50", latencies.median(), "ms"),
        ("decode_iteration_latency_p99", latencies.quantile(0.99), "ms"),
        ("decode_iteration_latency_max", latencies.max(), "ms"),
        (f"spikes_over_{spike_ms:g}ms_above_median", spikes, "count"),
    ):
        value = median_interval(samples) if len(samples) > 1 else float(samples.iloc[0])
        yield row(value, paper="vattention", figure="fig12", quantity=quantity, unit=unit, **_columns(run, way))
    for iteration, ms in own.groupby("iteration").latency_ms:
        yield row(median_interval(ms), paper="kvarena", figure=NAME, quantity="decode_iteration_latency_vs_iteration",
                  unit="ms", x=iteration, **_columns(run, way))  # fmt: skip


def _mapping_rows(
    run: Run, way: Way, own: pd.DataFrame, calls: pd.DataFrame, events_at: pd.Index
) -> Iterator[SummaryRow]:
    """Driver calls by where they are made, and what an event's own iteration waits for them."""
    mine = {"paper": "kvarena", "figure": NAME, **_columns(run, way)}
    counts = {f"{key}_driver_calls": calls[key].sum() for key in ("critical", "background")}
    counts["iterations_after_mapping"] = (own.actions > 0).sum()
    for quantity, count in counts.items():
        yield row(float(count), quantity=quantity, unit="count", **{**mine, "evidence": "exact"})
    waits = own[own.set_index(["round", "iteration"]).index.isin(events_at)].stall_ms
    if len(waits):
        yield row(median_interval(waits), quantity="wait_for_mapping", unit="ms", **mine)


def _event_rows(run: Run, table: pd.DataFrame) -> Iterator[SummaryRow]:
    """What an event adds in either way, the height of Fig 12's spikes, and how much of it overlap hides."""
    if table.empty:
        return
    for way in (Way.SYNC, Way.OVERLAPPED):
        yield row(median_interval(table[way] - table[Way.PREMAPPED]), paper="vattention", figure="fig12",
                  quantity="added_latency_of_mapping", unit="ms", **_columns(run, way))  # fmt: skip
    share = hidden_share(table)
    if not np.isnan(share.median):
        yield row(share, paper="kvarena", figure=NAME, quantity="hidden_share", unit="%",
                  **_columns(run, Way.OVERLAPPED))  # fmt: skip


def _columns(run: Run, way: Way) -> dict[str, Any]:
    evidence = "measured" if run.clock == "measured" else "conditional" if way is Way.IN_TURN else "predicted"
    shared = {"experiment": NAME, "panel": run.shown_model, "evidence": evidence}
    return shared | columns(run, system_in(way, the_system(run)))


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
    series = series.assign(way=series.system.map(_way_of))
    figure, axes = plots.canvas(1, 1 + series.way.nunique(), width=4)
    limit = 1.05 * series.value.max()
    for axis, (way, rows) in zip(axes, series.groupby("way", sort=False), strict=False):
        axis.plot(rows.x, rows.value, lw=0.8, color=COLOURS[Way(str(way))])
        axis.set(xlabel="decode iteration", ylabel="ms", ylim=(0, limit))
        axis.set_title(f"{way}\n{rows.panel.iloc[0]}; {rows.clock.iloc[0]}, {rows.device.iloc[0]}", fontsize=9)
    theirs = published_values("vattention", figure="fig12")
    ours = summary[summary.figure == "fig12"]
    _tails(axes[-1], ours, theirs if set(ours.panel) & set(theirs.panel) else theirs.iloc[:0])
    figure.tight_layout()
    return figure


def _way_of(system: str) -> Way:
    return next(way for way in reversed(Way) if way.value in system)


def _tails(axis: Axes, ours: pd.DataFrame, theirs: pd.DataFrame) -> None:
    """Bars of P50, P99 and the longest; dots are the published values."""
    marks = ("p50", "p99", "max")
    ways = list(dict.fromkeys(ours.system.map(_way_of)))
    for number, way in enumerate(ways):
        places = [i + 0.8 * ((number + 0.5) / len(ways) - 0.5) for i in range(len(marks))]
        for rows, published in ((ours, False), (theirs, True)):
            here = rows[rows.system.map(_way_of) == way].set_index("quantity").value
            values = [here.get(f"decode_iteration_latency_{mark}", np.nan) for mark in marks]
            if published:
                label = "published" if number == 0 and len(theirs) else None
                axis.plot(places, values, "k_", ms=12, mew=2, label=label)
            else:
                axis.bar(places, values, 0.75 / len(ways), color=COLOURS[way], label=str(way))
    axis.set_xticks(range(len(marks)), ["P50", "P99", "longest"])
    top = 1.4 * max([*ours[ours.unit == "ms"].value, *theirs[theirs.unit == "ms"].value])
    axis.set(ylabel="ms", title="latency of an iteration", ylim=(0, top))
    axis.legend(fontsize=7, frameon=False, ncols=2, loc="upper left")
