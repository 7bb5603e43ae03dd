"""Lengths of prompts and outputs in the traces (PagedAttention Fig 11): means, and histograms over the paper's bins.

From a file the counts are exact. Without one they come from an embedded length table, which was made from the paper's
data and gives its distribution back within a percent or so.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from kvarena.errors import UserError
from kvarena.experiments import plots
from kvarena.experiments.replay import TITLES, trace_named
from kvarena.harness.record import Outcome, Recorder
from kvarena.harness.run import Run
from kvarena.harness.summary import SummaryRow, frame, published_values, row
from kvarena.harness.trace import load_trace
from kvarena.harness.trace.config import TraceConfig
from kvarena.harness.trace.length_table import length_table
from kvarena.harness.trace.told import told
from kvarena.harness.trace.trace import Ints, Trace

NAME = "trace_lengths"
HEADLINE = "mean_length"
COUNTS = "histogram_count_vs_bin_left"


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
    bins: dict[str, Bins] = field(default_factory=dict)  # trace -> its range; other traces: their own


def run(run: Run, recorder: Recorder) -> Outcome:
    """Read every trace and count. Raises UserError where there is nothing to count."""
    params: Params = run.params
    if not params.traces or params.num_bins < 1:
        raise UserError(f"params.traces={params.traces}, params.num_bins={params.num_bins}: at least one of each")
    traces = {name: _whole(trace_named(run, name, params.paths.get(name))) for name in params.traces}
    summary = frame(r for name, trace in traces.items() for r in _summary(run, name, trace))
    notes = {name: trace.provenance for name, trace in traces.items()}
    nothing = pd.DataFrame({"trace": pd.Series(dtype=str)})  # lengths stay where they are: some may not be passed on
    return Outcome(summary, nothing, nothing, HEADLINE, draw(summary), notes)


def _whole(config: TraceConfig) -> Trace:
    """All of a file, or as many draws from a table as its data has records."""
    drawn = config.path is None and config.table is not None
    trace = load_trace(config, num_requests=length_table(str(config.table)).num_records if drawn else None)
    return told(config, trace)


def _summary(run: Run, name: str, trace: Trace) -> Iterator[SummaryRow]:
    paper = "pagedattention" if name in TITLES else "kvarena"
    shared: dict[str, Any] = {
        "experiment": NAME, "panel": TITLES.get(name, name), "allocator": "-", "kernel": "-", "model": "-",
        "clock": run.clock, "device": run.device_name,
        "evidence": "calibrated" if "table" in trace.provenance else "exact",
    }  # fmt: skip
    for system, lengths in (("input", trace.prompt_tokens), ("output", trace.output_tokens)):
        shared["system"] = system
        published = {"paper": paper, "figure": "fig11" if paper == "pagedattention" else NAME, **shared}
        yield row(float(lengths.mean()), quantity="mean_length", unit="tokens", **published)
        for left, count in _histogram(run.params, name, system, lengths):
            yield row(count, quantity=COUNTS, x=left, unit="records", **published)
        ours = {"paper": "kvarena", "figure": NAME, **shared}
        for percent in (50, 90, 99):
            value = float(np.percentile(lengths, percent))
            yield row(value, quantity=f"length_p{percent}", unit="tokens", **ours)
        yield row(len(lengths), quantity="num_records", unit="records", **ours)


def _histogram(params: Params, name: str, system: str, lengths: Ints) -> Iterator[tuple[float, int]]:
    """Left edge and count of every bin."""
    bins = params.bins.get(name)
    ends = (bins.prompt if system == "input" else bins.output) if bins else [int(lengths.min()), int(lengths.max())]
    if len(ends) != 2 or ends[0] >= ends[1]:
        raise UserError(f"params.bins.{name}: {ends} is not [shortest, longest]")
    counts, edges = np.histogram(lengths, bins=params.num_bins, range=(ends[0], ends[1]))
    yield from zip(_as_published(edges[:-1], name, system), counts.tolist(), strict=True)


def _as_published(lefts: NDArray[np.float64], name: str, system: str) -> list[float]:
    """Left edges to a thousandth of a token; those read out of the figure are taken as read, so that rows join."""
    rows = published_values("pagedattention", figure="fig11")
    read = rows[(rows.panel == TITLES.get(name)) & (rows.system == system) & (rows.quantity == COUNTS)]["x"].to_numpy()
    edges = []
    for left in lefts.tolist():
        close = [float(x) for x in read if abs(x - left) < 0.01]
        edges.append(close[0] if close else round(left, 3))
    return edges


def draw(summary: pd.DataFrame) -> Figure:
    """Densities as Fig 11 draws them, and the published counts where there are any."""
    theirs = published_values("pagedattention", figure="fig11")
    panels = list(dict.fromkeys(summary.panel))
    figure, axes = plots.canvas(1, len(panels), width=6)
    for axis, panel in zip(axes, panels, strict=True):
        _panel(axis, summary[summary.panel == panel], theirs[theirs.panel == panel])
        axis.set(title=f"PagedAttention Fig 11: {panel}\n{_source(summary)}", xlabel="tokens", ylabel="density")
        axis.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    return figure


def _source(summary: pd.DataFrame) -> str:
    return (
        "counted in the data" if set(summary.evidence) == {"exact"} else "drawn from a length table, at least in part"
    )


def _panel(axis: Axes, ours: pd.DataFrame, theirs: pd.DataFrame) -> None:
    longest = 0.0
    for system, colour in (("input", "#0072B2"), ("output", "#D55E00")):
        own = ours[ours.system == system]
        bins = own[own.quantity == COUNTS].sort_values("x")
        total = own[own.quantity == "num_records"]["value"].iloc[0]
        mean = own[own.quantity == "mean_length"]["value"].iloc[0]
        width = (bins.x.iloc[-1] - bins.x.iloc[0]) / (len(bins) - 1)
        axis.bar(bins.x, bins.value / total / width, width, align="edge", color=colour, alpha=0.5,
                 label=f"{system}, mean {mean:.2f}")  # fmt: skip
        dots = theirs[(theirs.system == system) & (theirs.quantity == COUNTS)]
        if len(dots):
            axis.plot(dots.x + width / 2, dots.value / total / width, "k.", ms=2.5, label=f"{system}, published counts")
        longest = max(longest, float(bins.x[bins.value.cumsum() < 0.9995 * total].max()))
        printed = theirs[(theirs.system == system) & (theirs.quantity == "mean_length")]["value"]
        for value in printed:
            axis.axvline(value, color=colour, lw=0.8, ls="--", label=f"{system}, published mean {value:.2f}")
    axis.set_xlim(0, longest)
