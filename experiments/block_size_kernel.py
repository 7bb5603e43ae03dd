"""What the size of a block does to a decode kernel (vAttention Fig 3), with the working set held equal.

    in order    the same bytes for every block size, more than the last-level cache holds; tables count up
    shuffled    the same bytes, every block somewhere else
    drawn       as published: 1024 blocks of any size, tables drawn with replacement, one batch again and again

In the third the bytes that a call touches grow with the block (`drawn_blocks.py`), so that a cache can make small
blocks look fast. Where a kernel slows down under `drawn` and not under `shuffled`, it was the cache.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvarena.errors import UserError
from kvarena.experiments import plots
from kvarena.experiments.attention_time import USUAL_BLOCK, Call, WorkingSet, seconds_per_call
from kvarena.experiments.block_sweep import check_block_sizes
from kvarena.experiments.drawn_blocks import DrawnBlocks
from kvarena.experiments.driver_calls import check_counts
from kvarena.harness.model import panel_name
from kvarena.harness.progress import Progress
from kvarena.harness.record import Frames, Outcome, Recorder
from kvarena.harness.run import Run
from kvarena.harness.statistics import median_interval
from kvarena.harness.summary import SummaryRow, frame, published_values, row
from kvarena.kernels.arrangement import Arrangement
from kvarena.kernels.catalogue import CATALOGUE
from kvarena.kernels.layout import Layout
from kvarena.kernels.registry import fits, get_kernel, kernel_spec, missing

NAME = "block_size_kernel"
HEADLINE = "decode_kernel_time_vs_batch_normalized_to_block16"
TABLES = ("in order", "shuffled", "drawn")
PUBLISHED_KERNEL = "vllm_paged"
PUBLISHED_CONTEXT = 16384


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


def run(run: Run, recorder: Recorder) -> Outcome:
    """Measure every batch size."""
    params: Params = run.params
    lines = _lines(run)
    tables = []
    with Progress(NAME, len(params.batch_sizes)) as progress:
        for batch in params.batch_sizes:
            progress.stage(f"batch {batch}")
            tables.append(recorder.cell(f"{batch}", partial(_cell, run, lines, batch))["samples"])
            progress.advance()
    samples = pd.concat(tables, ignore_index=True)
    summary = frame(_summary(run, samples))
    return Outcome(summary, pd.DataFrame({"batch": []}), samples, HEADLINE, draw(summary))


def _lines(run: Run) -> list[Line]:
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


def _misfit(run: Run, name: str, block_size: int | None) -> str | None:
    model = run.model
    return fits(kernel_spec(name), Layout.PAGED, run.device.kind, model.dtype, model.head_size, block_size)


def _cell(run: Run, lines: list[Line], batch: int) -> Frames:
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


def _calls(run: Run, equal: WorkingSet, line: Line, batch: int, device: torch.device) -> tuple[list[Call], int]:
    """The calls to time, and the bytes of K/V that they touch before any is touched again."""
    params: Params = run.params
    kernel = get_kernel(line.kernel)
    if line.tables == "drawn":
        drawn = DrawnBlocks(run.model, batch, params.context, line.block_size, params.drawn_blocks, device)
        return drawn.calls(kernel), drawn.distinct_bytes
    arrangement = Arrangement(line.block_size, scattered=line.tables == "shuffled")
    return equal.calls(kernel, arrangement), equal.bytes_per_call * equal.num_batches


def _summary(run: Run, samples: pd.DataFrame) -> Iterator[SummaryRow]:
    for (kernel, tables, batch), cell in samples.groupby(["kernel", "tables", "batch"], sort=False):
        by_size = {int(part.block_size.iloc[0]): part for _, part in cell.groupby("block_size")}
        usual = by_size[USUAL_BLOCK].set_index("round").call_s
        for size, part in by_size.items():
            columns = _columns(run, str(kernel), str(tables), size)
            ours = {**columns, "paper": "kvarena", "figure": NAME, "x": batch}
            times = part.set_index("round").call_s
            if size != USUAL_BLOCK:
                yield row(median_interval(times / usual), paper="vattention", figure="fig3", x=batch,
                          quantity=HEADLINE, unit="ratio", **columns)  # fmt: skip
            yield row(median_interval(1e6 * times), quantity="decode_kernel_time_vs_batch", unit="us", **ours)
            yield row(float(part.touched_bytes.iloc[0]), quantity="working_set_vs_batch", unit="bytes",
                      **{**ours, "evidence": "exact"})  # fmt: skip


def _columns(run: Run, kernel: str, tables: str, size: int) -> dict[str, Any]:
    """The published names where a GPU runs the published kernel as published, else ours."""
    imitates = (
        run.imitates and kernel == PUBLISHED_KERNEL and tables == "drawn" and run.params.context == PUBLISHED_CONTEXT
    )
    panel = f"{panel_name(run.model)} 16K" if imitates else f"{run.model.name} {run.params.context} tokens, {tables}"
    return {
        "experiment": NAME, "panel": panel, "system": f"block {size}" if imitates else f"block {size}/{kernel}",
        "allocator": "paged", "kernel": kernel, "model": run.model.name, "clock": run.clock,
        "device": run.device_name, "evidence": "measured",
    }  # fmt: skip


def draw(summary: pd.DataFrame) -> Figure:
    """Time over that of blocks of 16: one panel for each way the tables point, and the published one."""
    ours = summary[summary.quantity == HEADLINE]
    theirs = published_values("vattention", figure="fig3")
    panels = list(ours.groupby("panel", sort=False))
    figure, axes = plots.canvas(1, len(panels) + 1, width=4)
    limit = 1.1 * max(2.0, ours.value.max())
    for axis, (panel, rows) in zip(axes, panels, strict=False):
        _lines_over_batch(axis, rows, f"{panel}\n{rows.clock.iloc[0]}, {rows.device.iloc[0]}", limit)
    _lines_over_batch(axes[-1], theirs, "published: vAttention Fig 3\nLlama-3-8B 16K, vLLM's kernel, A100", limit)
    figure.tight_layout()
    return figure


def _lines_over_batch(axis: Axes, rows: pd.DataFrame, title: str, limit: float) -> None:
    for marker, (system, line) in zip(plots.MARKERS, rows.groupby("system", sort=False), strict=False):
        axis.plot(line.x, line.value, marker=marker, ms=4, label=str(system))
        if "ci_low" in line:
            axis.fill_between(line.x, line.ci_low.astype(float), line.ci_high.astype(float), alpha=0.15, lw=0)
    axis.axhline(1, color="black", lw=0.8)
    plots.batch_axis(axis, sorted(rows.x.unique()))
    axis.set(ylabel=f"time over blocks of {USUAL_BLOCK}", ylim=(0, limit))
    axis.set_title(title, fontsize=9)
    axis.legend(fontsize=7, frameon=False, loc="lower left")
