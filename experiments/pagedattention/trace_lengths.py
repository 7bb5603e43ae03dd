"""Lengths of prompts and outputs in the traces (PagedAttention Fig 11): means, and histograms over the paper's bins.

From a file the counts are exact. Without one they come from an embedded length table, which was made from the paper's
data and gives its distribution back within a percent or so.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from kvarena.errors import UserError
from kvarena.experiments.kit.panels import Panel, drawn, published_of
from kvarena.experiments.kit.replay import trace_named
from kvarena.harness.accounts.told import tell_once, told
from kvarena.harness.record.record import Frames, Measured, Recorder
from kvarena.harness.record.summary import Evidence, Names, SummaryRow, published_values, row
from kvarena.harness.run.published import OURS, is_earned, named
from kvarena.harness.run.run import Run
from kvarena.harness.trace import load_trace
from kvarena.harness.trace.config import TraceConfig
from kvarena.harness.trace.length_table import length_table
from kvarena.harness.trace.published_files import is_published
from kvarena.harness.trace.trace import Ints, Trace

HEADLINE = "mean_length"
READS = {"modelled": ("trace",), "measured": ("trace",)}
FIGURE = "fig11"
COUNTS = "histogram_count_vs_bin_left"
OUTSIDE = "records_outside_of_bins"
DIGITS = 6  # of x in summary.csv: bins must not be so narrow that two begin alike


@dataclass
class Bins:
    """Of one panel of Fig 11: shortest and longest prompt and output, in tokens."""

    prompt: list[int]
    output: list[int]


@dataclass
class Params:
    """`params.*` of conf/experiment/trace_lengths.yaml."""

    traces: list[str] = field(default_factory=list)  # names of conf/trace/
    paths: dict[str, str | None] = field(default_factory=dict)  # trace -> local file, beside trace.path
    num_bins: int = 128
    bins: dict[str, Bins] = field(default_factory=dict)  # trace -> its range; other traces, and other files: their own


def unread(run: Run[Params]) -> dict[str, str]:
    """Keys that this run does not read, and what to write instead."""
    params: Params = run.params
    unused = {"clock": "no clock is read; leave clock=modelled"} if run.clock == "measured" else {}
    unused["trace.mix"] = "it says how requests are decoded, not how long they are"
    listed = f"params.traces names the traces: {', '.join(params.traces)}"
    if run.trace.name not in params.traces:
        unused["trace"] = f"{listed}; params.traces=[{run.trace.name}] counts this one"
    elif params.paths.get(run.trace.name):
        unused["trace.path"] = f"params.paths.{run.trace.name} is its file"
    for key, values in (("paths", params.paths), ("bins", params.bins)):
        unused |= {f"params.{key}.{name}": listed for name in values if name not in params.traces}
    return unused


def measure(run: Run[Params], recorder: Recorder) -> Measured:
    """Read every trace and count. Lengths stay where they are: some may not be passed on.

    Raises UserError where there is nothing to count.
    """
    params: Params = run.params
    if not params.traces or params.num_bins < 1 or len(set(params.traces)) < len(params.traces):
        raise UserError(
            f"params.traces={params.traces}, params.num_bins={params.num_bins}: at least one of each, no trace twice"
        )
    statistics, histograms, notes = list[dict[str, object]](), list[pd.DataFrame](), {}
    for name in params.traces:
        config = _of_trace(run, name).trace
        trace = _whole(config)
        notes[name] = trace.provenance
        for side, lengths in (("input", trace.prompt_tokens), ("output", trace.output_tokens)):
            column = {"trace": name, "side": side}
            drawn = "table" in trace.provenance
            statistics.append({**column, "drawn": drawn, **_statistics(lengths)})
            histograms.append(_histogram(run, config, side, lengths).assign(**column))
    return Measured(
        {"statistics": pd.DataFrame(statistics), "histograms": pd.concat(histograms, ignore_index=True)}, notes
    )


def _of_trace(run: Run[Params], name: str) -> Run[Params]:
    """The run with one of its traces; those of Fig 11 have the figure's filter where they are the paper's own data."""
    panels = map(run.published[FIGURE].panel, run.published[FIGURE].panels)
    keys = next((panel.trace_keys for panel in panels if panel.trace == name), {})
    return replace(run, trace=replace(trace_named(run, name, run.params.paths.get(name)), **keys))


def _whole(config: TraceConfig) -> Trace:
    """All of a file, or as many draws from a table as its data has records; or as many as are asked for."""
    drawn = config.path is None and config.table is not None and config.num_requests is None
    trace = load_trace(config, num_requests=length_table(str(config.table)).num_records if drawn else None)
    return told(config, trace)


def _statistics(lengths: Ints) -> dict[str, float]:
    percentiles = {f"length_p{percent}": float(np.percentile(lengths, percent)) for percent in (50, 90, 99)}
    return {HEADLINE: float(lengths.mean()), **percentiles, "num_records": float(len(lengths))}


def _histogram(run: Run[Params], config: TraceConfig, side: str, lengths: Ints) -> pd.DataFrame:
    """Left edge and count of every bin. A trace of one's own takes Fig 11's range only where that is asked for."""
    bins = run.params.bins.get(config.name)
    asked = any(key.startswith(f"params.bins.{config.name}") or key == "params.bins" for key in run.given)
    if bins is None or not (asked or is_published(config)):
        ends = [int(lengths.min()), int(lengths.max())]
        asked = False
    else:
        ends = bins.prompt if side == "input" else bins.output
    if asked and (len(ends) != 2 or ends[0] >= ends[1]):
        raise UserError(f"params.bins.{config.name}: {ends} is not [shortest, longest]")
    if ends[0] == ends[1]:
        return pd.DataFrame({"left": [float(ends[0])], "count": [len(lengths)]})
    narrowest = max(1, 2 * 10 ** (len(str(ends[1])) - DIGITS))
    num_bins = max(1, min(run.params.num_bins, (ends[1] - ends[0]) // narrowest))
    counts, edges = np.histogram(lengths, bins=num_bins, range=(ends[0], ends[1]))
    if outside := len(lengths) - counts.sum():
        tell_once(f"{config.name}: {outside} of {len(lengths)} {side} lengths lie outside of {ends}, and in no bin")
    return pd.DataFrame({"left": edges[:-1], "count": counts})


def summarize(run: Run[Params], frames: Frames) -> Iterator[SummaryRow]:
    """Means, percentiles and counts of every trace: exact from a file, calibrated from a table, which was fitted."""
    statistics, histograms = frames["statistics"], frames["histograms"]
    for found in statistics.to_dict("records"):
        name, side = found["trace"], found["side"]
        here, bins = _of_trace(run, name), run.params.bins.get(name)
        ours = partial(named, here, label=side, counted=not found["drawn"], fitted=found["drawn"])
        of_figure = partial(ours, None, FIGURE, key=side, bins=asdict(bins) if bins else None)
        yield row(found[HEADLINE], quantity=HEADLINE, unit="tokens", **of_figure())
        counts = histograms[(histograms.trace == name) & (histograms.side == side)]
        for left, count in zip(counts.left.tolist(), counts["count"].tolist(), strict=True):
            names = of_figure(x=round(left, 3))
            if is_earned(names):
                names["x"] = _as_published(left, names)
            yield row(count, quantity=COUNTS, unit="records", **names)
        if outside := found["num_records"] - counts["count"].sum():
            yield row(outside, quantity=OUTSIDE, unit="records", **ours())
        for quantity in ("length_p50", "length_p90", "length_p99", "num_records"):
            unit = "records" if quantity == "num_records" else "tokens"
            yield row(found[quantity], quantity=quantity, unit=unit, **ours())


def _as_published(left: float, names: Names) -> float:
    """A left edge as it was read out of the figure, so that rows join; else to a thousandth of a token."""
    rows = published_values(names["paper"], figure=FIGURE, panel=names["panel"], system=names["system"])
    read = [float(x) for x in rows[rows.quantity == COUNTS].x if abs(x - left) < 0.01]
    return read[0] if read else round(left, 3)


def _source(rows: pd.DataFrame) -> str:
    return "counted in the data" if set(rows.evidence) == {Evidence.EXACT} else "drawn from a length table"


_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")  # of a trace's input and output, in turn


def _panel(axis: Axes, ours: pd.DataFrame) -> None:
    """Densities as Fig 11 draws them, and the published counts where the trace is the figure's."""
    longest, theirs, earned = 0.0, published_of(ours), ours[ours.paper != OURS]
    for number, system in enumerate(dict.fromkeys(ours.label)):  # a sweep's labels go on with what differs
        own, colour = ours[ours.label == system], _COLOURS[number % len(_COLOURS)]
        bins = own[own.quantity == COUNTS].sort_values("x")
        total = own[own.quantity == "num_records"]["value"].iloc[0]
        mean = own[own.quantity == "mean_length"]["value"].iloc[0]
        width = (bins.x.iloc[-1] - bins.x.iloc[0]) / max(1, len(bins) - 1) or 1.0
        axis.bar(bins.x, bins.value / total / width, width, align="edge", color=colour, alpha=0.5,
                 label=f"{system}, mean {mean:.2f}")  # fmt: skip
        dots = theirs[(theirs.system == system) & (theirs.quantity == COUNTS)]
        if len(dots):
            axis.plot(dots.x + width / 2, dots.value / total / width, "k.", ms=2.5, label=f"{system}, published counts")
        outside = float(own.value[own.quantity == OUTSIDE].sum())
        longest = max(
            longest, float(bins.x[bins.value[::-1].cumsum()[::-1] > 0.0005 * (total - outside)].max()) + width
        )
        if outside:
            axis.plot([], [], " ", label=f"{system}: {outside:.0f} lie in no bin")
        printed = theirs[(theirs.system == system) & (theirs.quantity == "mean_length")]["value"]
        for value in printed:
            axis.axvline(value, color=colour, lw=0.8, ls="--", label=f"{system}, published mean {value:.2f}")
    axis.set_xlim(0, longest)
    title = f"PagedAttention Fig 11: {earned.panel.iloc[0]}" if len(earned) else ours.setup.iloc[0]
    axis.set_title(f"{title}\n{_source(ours)}", fontsize=8)


draw = partial(
    drawn, panels=[Panel(_panel, f"{COUNTS}|num_records|{HEADLINE}|{OUTSIDE}", "density", "tokens")], width=6
)
