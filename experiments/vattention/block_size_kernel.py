"""What the size of a block does to a decode kernel (vAttention Fig 3), with the working set held equal.

    in order    the same bytes for every block size, more than the last-level cache holds; tables count up
    shuffled    the same bytes, every block somewhere else
    drawn       as published: 1024 blocks of any size, tables drawn with replacement, one batch again and again

In the third the bytes that a call touches grow with the block (`random_blocks.py`), so that a cache can make small
blocks look fast. Where a kernel slows down under `drawn` and not under `shuffled`, it was the cache.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvarena.errors import UserError
from kvarena.experiments.kit import plots
from kvarena.experiments.kit.attention_time import USUAL_BLOCK, Call, WorkingSet, seconds_per_call
from kvarena.experiments.kit.block_sweep import check_block_sizes
from kvarena.experiments.kit.kernel_pairs import allocator_named, kernel_over, unread_of_model
from kvarena.experiments.vattention.driver_calls import check_counts
from kvarena.experiments.vattention.random_blocks import DrawnBlocks
from kvarena.harness.record.progress import Progress
from kvarena.harness.record.record import Frames, Measured, Recorder
from kvarena.harness.record.statistics import median_interval
from kvarena.harness.record.summary import SummaryRow, published_values, row
from kvarena.harness.run.published import OURS, named
from kvarena.harness.run.run import Run
from kvarena.kernels.arrangement import Arrangement
from kvarena.kernels.catalogue import CATALOGUE
from kvarena.kernels.layout import Layout
from kvarena.kernels.registry import fits, get_kernel, kernel_spec, missing

NAME = "block_size_kernel"
HEADLINE = "decode_kernel_time_vs_batch_normalized_to_block16"
FIGURE = "fig3"
READS = {"measured": ("model", "device", "threads")}
TABLES = ("in order", "shuffled", "drawn")


@dataclass
class Params:
    """`params.*` of conf/experiment/block_size_kernel.yaml; null there means: by the profile."""

    batch_sizes: list[int] = field(default_factory=list)
    context: int = 0  # tokens of every sequence
    block_sizes: list[int] = field(default_factory=list)
    kernels: list[str] | None = None  # null: all that read blocks here
    working_set_bytes: int = 0  # K/V that is read before any of it is read again
    drawn_blocks: int = 0  # published protocol: blocks of the pool
    rounds: int = 0  # interleaved repetitions; at least 6 give 95 %


class Line(NamedTuple):
    """A kernel over blocks of one size, and how its tables point to them."""

    kernel: str
    tables: str  # of TABLES
    block_size: int


def unread(run: Run[Params]) -> dict[str, str]:
    """Keys that this run does not read, and what to write instead."""
    return unread_of_model(run)


def measure(run: Run[Params], recorder: Recorder) -> Measured:
    """Measure every batch size."""
    params: Params = run.params
    lines = _lines(run)
    tables = []
    with Progress(NAME, len(params.batch_sizes)) as progress:
        for batch in params.batch_sizes:
            progress.stage(f"batch {batch}")
            tables.append(recorder.cell(f"{batch}", partial(_cell, run, lines, batch))["samples"])
            progress.advance()
    return Measured({"samples": pd.concat(tables, ignore_index=True)})


def summarize(run: Run[Params], frames: Frames) -> Iterator[SummaryRow]:
    """Time by block size over that of blocks of 16, the time itself, and the bytes that were touched."""
    samples = frames["samples"]
    for (kernel, tables, batch), cell in samples.groupby(["kernel", "tables", "batch"], sort=False):
        by_size = {int(part.block_size.iloc[0]): part for _, part in cell.groupby("block_size")}
        usual = by_size[USUAL_BLOCK].set_index("round").call_s
        for size, part in by_size.items():
            names = partial(
                named, run, kernel_over(allocator_named("paged"), str(kernel)), label=f"block {size}/{kernel}",
                detail=f"{run.params.context} tokens, {tables}", x=float(str(batch)),
            )  # fmt: skip
            times = part.set_index("round").call_s
            if size != USUAL_BLOCK:
                yield row(median_interval(times / usual), quantity=HEADLINE, unit="ratio",
                          **names(FIGURE, key=f"block {size}", tables=tables))  # fmt: skip
            yield row(median_interval(1e6 * times), quantity="decode_kernel_time_vs_batch", unit="us", **names())
            yield row(float(part.touched_bytes.iloc[0]), quantity="working_set_vs_batch", unit="bytes",
                      **names(counted=True))  # fmt: skip


def _lines(run: Run[Params]) -> list[Line]:
    """Kernels, tables and block sizes that fit. Raises UserError where nothing does, or 16 is missing."""
    params: Params = run.params
    check_block_sizes(params.block_sizes)
    check_counts(params, "batch_sizes", "context", "drawn_blocks", "rounds")
    odd = [size for size in params.block_sizes if size & (size - 1) or size > params.context]
    if odd or USUAL_BLOCK not in params.block_sizes:
        raise UserError(
            f"params.block_sizes={params.block_sizes}: powers of two, {USUAL_BLOCK} among them, none longer than "
            f"params.context={params.context}"
        )
    for name in params.kernels or ():
        if reason := missing(kernel_spec(name)) or _misfit(run, name, None):
            raise UserError(f"params.kernels: {name}: {reason}")
    names = params.kernels or [name for name, (spec, *_) in CATALOGUE.items() if missing(spec) is None]
    lines = [
        Line(*line)
        for line in itertools.product(names, TABLES, params.block_sizes)
        if _misfit(run, line[0], line[2]) is None
    ]
    if not lines:
        raise UserError(f"params.kernels={params.kernels}: none that runs here reads blocks of {run.model.name}")
    return lines


def _misfit(run: Run[Params], name: str, block_size: int | None) -> str | None:
    model = run.model
    return fits(kernel_spec(name), Layout.PAGED, run.device.kind, model.dtype, model.head_size, block_size)


def _cell(run: Run[Params], lines: list[Line], batch: int) -> Frames:
    """Seconds of one call, a row for each line and round; each round begins with another line."""
    params: Params = run.params
    device = torch.device(run.device.kind)
    equal = WorkingSet(run.model, batch, params.context, params.working_set_bytes, device)
    timers, touched = {}, {}
    for line in lines:
        kernel = get_kernel(line.kernel)
        calls, touched[line] = _calls(run, equal, line, batch, device)
        timers[line] = seconds_per_call(calls, device, kernel.spec.in_graph)
    rows = []
    for number in range(params.rounds):
        turn = number % len(lines)
        for line in [*lines[turn:], *lines[:turn]]:
            rows.append({**line._asdict(), "batch": batch, "round": number, "call_s": timers[line](),
                         "touched_bytes": touched[line]})  # fmt: skip
    return {"samples": pd.DataFrame(rows)}


def _calls(run: Run[Params], equal: WorkingSet, line: Line, batch: int, device: torch.device) -> tuple[list[Call], int]:
    """The calls to time, and the bytes of K/V that they touch before any is touched again."""
    params: Params = run.params
    kernel = get_kernel(line.kernel)
    if line.tables == "drawn":
        drawn = DrawnBlocks(run.model, batch, params.context, line.block_size, params.drawn_blocks, device)
        return drawn.calls(kernel), drawn.distinct_bytes
    arrangement = Arrangement(line.block_size, scattered=line.tables == "shuffled")
    return equal.calls(kernel, arrangement), equal.bytes_per_call * equal.num_batches


def draw(summary: pd.DataFrame) -> Figure:
    """Time over that of blocks of 16: a panel for each way the tables point, with published points it stands for."""
    ours = summary[summary.quantity == HEADLINE]
    theirs = published_values("vattention", figure=FIGURE)
    setups = list(ours.groupby("setup", sort=False))
    figure, axes = plots.canvas(1, len(setups), width=5)
    limit = 1.1 * max(2.0, ours.value.max())
    for axis, (setup, rows) in zip(axes, setups, strict=True):
        title = "vAttention Fig 3" if plots.stands_for(rows, FIGURE) else "decode kernel by block size"
        _lines_over_batch(axis, rows, theirs)
        axis.set(ylabel=f"time over blocks of {USUAL_BLOCK}", ylim=(0, limit))
        axis.set_title(f"{title}\n{setup}; {rows.clock.iloc[0]}", fontsize=9)
        axis.legend(fontsize=7, frameon=False, loc="lower left")
    figure.tight_layout()
    return figure


def _lines_over_batch(axis: Axes, rows: pd.DataFrame, theirs: pd.DataFrame) -> None:
    names = plots.shown_names(rows)
    for number, (label, line) in enumerate(rows.groupby("label", sort=False)):
        colour = f"C{number}"
        axis.plot(line.x, line.value, marker=plots.MARKERS[number % len(plots.MARKERS)], ms=4, color=colour,
                  label=names[str(label)])  # fmt: skip
        axis.fill_between(line.x, line.ci_low.astype(float), line.ci_high.astype(float), color=colour, alpha=0.15, lw=0)
        first = line.iloc[0]
        if first.paper != OURS:
            points = theirs[(theirs.panel == first.panel) & (theirs.system == first.system)]
            axis.plot(points.x, points.value, "o:", ms=4, mfc="white", color=colour, label=f"{first.system}, published")
    axis.axhline(1, color="black", lw=0.8)
    plots.batch_axis(axis, sorted(rows.x.unique()))
