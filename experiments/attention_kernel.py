"""What a block table costs the attention kernel (PagedAttention Fig 18a): latency by context, for batches of 8 and 32.

The paper compares two kernels, its own with a table and FasterTransformer's without, so that layout and craft come
together. Here a kernel that reads both layouts runs on the same bytes as rows, as blocks in order and as scattered
blocks: only where they lie differs. Kernels that read one layout stand beside them.
"""

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
from kvarena.experiments.attention_time import USUAL_BLOCK, WorkingSet, seconds_per_call
from kvarena.experiments.block_sweep import block_axis, check_block_sizes
from kvarena.harness.calibration import StreamingRead
from kvarena.harness.progress import Progress
from kvarena.harness.record import Frames, Outcome, Recorder
from kvarena.harness.run import Run
from kvarena.harness.statistics import median_interval
from kvarena.harness.summary import SummaryRow, frame, published_values, row
from kvarena.kernels.arrangement import Arrangement
from kvarena.kernels.catalogue import CATALOGUE
from kvarena.kernels.layout import Layout
from kvarena.kernels.registry import fits, get_kernel, kernel_spec, missing

NAME = "attention_kernel"
HEADLINE = "attention_kernel_latency_vs_context"
PUBLISHED_AS = {Layout.CONTIGUOUS: "FasterTransformer", Layout.PAGED: "vLLM"}


@dataclass
class Params:
    """`params.*` of conf/experiment/attention_kernel.yaml; null there means: by the profile."""

    batch_sizes: list[int] = field(default_factory=list)
    contexts: list[int] = field(default_factory=list)  # tokens of every sequence
    block_sizes: list[int] = field(default_factory=list)  # compared at the largest batch and context
    kernels: list[str] | None = None  # null: all that can read the model's heads here
    working_set_bytes: int = 0  # K/V that is read before any of it is read again
    rounds: int = 0  # interleaved repetitions; at least 6 give 95 %


class Line(NamedTuple):
    """A kernel on one arrangement of the same bytes."""

    kernel: str
    arrangement: Arrangement

    @property
    def label(self) -> str:
        """`<allocator>/<kernel>`; blocks lie scattered unless it says otherwise."""
        block, scattered = self.arrangement
        return f"{'static' if block is None else 'paged' if scattered else 'paged-in-order'}/{self.kernel}"


def run(run: Run, recorder: Recorder) -> Outcome:
    """Measure every batch size and context, and every block size at the largest of them."""
    params: Params = run.params
    _check(params)
    device = torch.device(run.device.kind)
    read = StreamingRead(device)
    largest = max(params.batch_sizes), max(params.contexts)
    cells = [(batch, context, False) for batch in params.batch_sizes for context in params.contexts]
    tables: list[pd.DataFrame] = []
    with Progress(NAME, len(cells) + 1) as progress:
        for batch, context, by_block in [*cells, (*largest, True)]:
            key = f"{batch}x{context}" + ("-by-block" if by_block else "")
            progress.stage(key)
            lines = _lines_by_block(run) if by_block else _lines(run)
            cell = recorder.cell(key, partial(_cell, run, read, lines, batch, context))
            tables.append(cell["samples"].assign(by_block=by_block))
            progress.advance()
    samples = pd.concat(tables, ignore_index=True)
    summary = frame([*_context_rows(run, samples[~samples.by_block]), *_block_rows(run, samples[samples.by_block])])
    return Outcome(summary, pd.DataFrame(), samples, HEADLINE, draw(summary))


def _check(params: Params) -> None:
    check_block_sizes(params.block_sizes)
    for key in ("batch_sizes", "contexts"):
        values = getattr(params, key)
        if not values or min(values) < 1 or len(set(values)) < len(values):
            raise UserError(f"params.{key}={values}: name at least one, each 1 or more, and none twice")
    if params.rounds < 1:
        raise UserError(f"params.rounds={params.rounds}: at least 1 is needed")
    longest = max(USUAL_BLOCK, *params.contexts)
    odd = [size for size in params.block_sizes if size & (size - 1) or size > longest]
    if odd or USUAL_BLOCK not in params.block_sizes:
        raise UserError(
            f"params.block_sizes={params.block_sizes}: powers of two, {USUAL_BLOCK} among them, none longer than the "
            f"longest context, {longest}"
        )


def _lines(run: Run) -> list[Line]:
    """Every kernel on rows, scattered blocks and blocks in order, as it can read them."""
    arrangements = (Arrangement(None), Arrangement(USUAL_BLOCK, scattered=True), Arrangement(USUAL_BLOCK))
    return [Line(name, a) for name in _kernels(run) for a in arrangements if _misfit(run, name, a) is None]


def _lines_by_block(run: Run) -> list[Line]:
    """Kernels that read rows and blocks alike, on scattered blocks of every size."""
    pairs = [name for name in _kernels(run) if len(kernel_spec(name).layouts) > 1]
    sizes = [Arrangement(size, scattered=True) for size in run.params.block_sizes]
    return [Line(name, a) for name in pairs for a in sizes if _misfit(run, name, a) is None]


def _kernels(run: Run) -> list[str]:
    """The kernels to measure. Raises UserError for one that cannot run here, and where none can."""
    if run.params.kernels is None:
        names = [name for name, (spec, *_) in CATALOGUE.items() if missing(spec) is None]
        return [name for name in names if _readable(run, name)]
    for name in run.params.kernels:
        if reason := missing(kernel_spec(name)):
            raise UserError(f"params.kernels: {name}: {reason}")
        if not _readable(run, name):
            layout = next(iter(kernel_spec(name).layouts))
            raise UserError(f"params.kernels: {name} {_misfit_of(run, name, layout, None)}")
    return list(run.params.kernels)


def _readable(run: Run, name: str) -> bool:
    return any(_misfit_of(run, name, layout, None) is None for layout in kernel_spec(name).layouts)


def _misfit(run: Run, name: str, arrangement: Arrangement) -> str | None:
    return _misfit_of(run, name, arrangement.layout, arrangement.block_size)


def _misfit_of(run: Run, name: str, layout: Layout, block_size: int | None) -> str | None:
    model = run.model
    return fits(kernel_spec(name), layout, run.device.kind, model.dtype, model.head_size, block_size)


def _cell(run: Run, read: StreamingRead, lines: list[Line], batch: int, context: int) -> Frames:
    """Seconds of one call, a row for each line and round; each round begins with another line."""
    device = torch.device(run.device.kind)
    working_set = WorkingSet(run.model, batch, context, run.params.working_set_bytes, device)
    timers = {}
    for line in lines:
        kernel = get_kernel(line.kernel)
        timers[line] = seconds_per_call(working_set.calls(kernel, line.arrangement), device, kernel.spec.in_graph)
    rows = []
    for number in range(run.params.rounds):
        limit = read.gb_per_s(repetitions=1)
        turn = number % len(lines)
        for line in [*lines[turn:], *lines[:turn]]:
            rows.append(
                {"batch": batch, "context": context, "round": number, "kernel": line.kernel, "label": line.label,
                 "block_size": line.arrangement.block_size, "scattered": line.arrangement.scattered,
                 "call_s": timers[line](), "bytes": working_set.bytes_per_call, "streaming_gb_per_s": limit}
            )  # fmt: skip
    return {"samples": pd.DataFrame(rows).astype({"block_size": float})}


def _columns(run: Run, label: str, kernel: str) -> dict[str, Any]:
    """What every row says. Where the run imitates the paper's, a kernel of both layouts wears the published names."""
    layout = Layout.CONTIGUOUS if label.startswith("static") else Layout.PAGED
    imitates = run.imitates and len(kernel_spec(kernel).layouts) > 1 and not label.startswith("paged-in-order")
    return {
        "experiment": NAME, "system": PUBLISHED_AS[layout] if imitates else label,
        "allocator": "static" if layout is Layout.CONTIGUOUS else "paged", "kernel": kernel,
        "model": run.model.name, "clock": run.clock, "device": run.device_name, "evidence": "measured",
    }  # fmt: skip


def _context_rows(run: Run, samples: pd.DataFrame) -> Iterator[SummaryRow]:
    ours = {"paper": "kvarena", "figure": NAME}
    for (batch, context, label, kernel), rows in samples.groupby(["batch", "context", "label", "kernel"], sort=False):
        panel = f"bs{batch}" if run.imitates else f"{run.model.name} bs{batch}"
        common = {"panel": panel, "x": context, **_columns(run, str(label), str(kernel))}
        by_round = rows.set_index("round")
        yield row(median_interval(1e6 * by_round.call_s), paper="pagedattention", figure="fig18a", quantity=HEADLINE,
                  unit="us", **common)  # fmt: skip
        share = 100 * by_round.bytes / by_round.call_s / 1e9 / by_round.streaming_gb_per_s
        yield row(median_interval(share), quantity="kv_read_share_of_streaming_read_vs_context", unit="%",
                  **ours, **common)  # fmt: skip
        here = (samples.batch == batch) & (samples.context == context) & (samples.label == f"static/{kernel}")
        on_rows = samples[here].set_index("round").call_s
        if len(on_rows) and not str(label).startswith("static"):
            yield row(median_interval(by_round.call_s / on_rows), quantity="time_over_contiguous_vs_context",
                      unit="ratio", **ours, **common)  # fmt: skip


def _block_rows(run: Run, samples: pd.DataFrame) -> Iterator[SummaryRow]:
    """Time by block size, over that of blocks of 16: `params.kernel_cost` of experiment=block_size takes these."""
    for kernel, rows in samples.groupby("kernel", sort=False):
        usual = rows[rows.block_size == USUAL_BLOCK].set_index("round").call_s
        for size, part in rows.groupby("block_size"):
            yield row(
                median_interval(part.set_index("round").call_s / usual), paper="kvarena", figure=NAME,
                panel=f"{run.model.name} bs{part.batch.iloc[0]} {part.context.iloc[0]} tokens", x=size,
                quantity="time_over_block_16_vs_block_size", unit="ratio",
                **_columns(run, str(part.label.iloc[0]), str(kernel)),
            )  # fmt: skip


def draw(summary: pd.DataFrame) -> Figure:
    """Fig 18a, ours above and the published one below; and what scattered blocks cost one and the same kernel."""
    ours = summary[summary.quantity == HEADLINE]
    published = published_values("pagedattention", figure="fig18a")
    where = f"{ours.model.iloc[0]}, {ours.clock.iloc[0]}, {ours.device.iloc[0]}"
    titles = f"this run: {{panel}}\n{where}", "published: {panel}\nOPT-13B's heads, A100"
    figure, above, below = plots.over_published(ours, published, _latency, titles)
    _ratios(above, summary[summary.quantity == "time_over_contiguous_vs_context"], where)
    _block_sizes(below, summary[summary.quantity == "time_over_block_16_vs_block_size"], where)
    return plots.tidy(figure)


def _latency(axis: Axes, rows: pd.DataFrame, title: str) -> None:
    plots.lines(axis, rows)
    axis.set(ylabel="one call, us", title=title, ylim=(0, None))
    _context_axis(axis, rows)


def _ratios(axis: Axes, rows: pd.DataFrame, where: str) -> None:
    for (panel, system), part in rows.groupby(["panel", "system"], sort=False):
        axis.plot(part.x, part.value, "o-", ms=4, label=f"{system}, {panel}")
        axis.fill_between(part.x, part.ci_low.astype(float), part.ci_high.astype(float), alpha=0.15, lw=0)
    axis.axhline(1, color="black", lw=0.8)
    axis.set(ylabel="time over rows, same kernel", title=f"blocks of {USUAL_BLOCK} over rows\n{where}")
    if len(rows):
        _context_axis(axis, rows)


def _context_axis(axis: Axes, rows: pd.DataFrame) -> None:
    plots.batch_axis(axis, sorted(rows.x.unique()))
    axis.set_xlabel("context, tokens")
    axis.legend(fontsize=6, frameon=False)


def _block_sizes(axis: Axes, rows: pd.DataFrame, where: str) -> None:
    if rows.empty:
        return
    plots.lines(axis, rows)
    axis.axhline(1, color="black", lw=0.8)
    axis.set(ylabel=f"time over blocks of {USUAL_BLOCK}", title=f"scattered blocks: {rows.panel.iloc[0]}\n{where}")
    axis.set_ylim(0, None)
    block_axis(axis, rows.x)
    axis.legend(fontsize=6, frameon=False)
