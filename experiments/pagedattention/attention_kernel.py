"""What a block table costs the attention kernel (PagedAttention Fig 18a): latency by context, for batches of 8 and 32.

The paper compares two kernels, its own with a table and FasterTransformer's without, so that layout and craft come
together. Here a kernel that reads both layouts runs on the same bytes as rows, as blocks in order and as scattered
blocks: only where they lie differs. Kernels that read one layout stand beside them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import pandas as pd
import torch

from kvarena.errors import UserError
from kvarena.experiments.kit.attention_time import (
    USUAL_BLOCK,
    Timer,
    WorkingSet,
    left_out,
    seconds_per_call,
    timers_of,
)
from kvarena.experiments.kit.cells import Cell, run_cells
from kvarena.experiments.kit.kernel_pairs import (
    allocator_named,
    check_table_sizes,
    kernel_over,
    kernels_here,
    misfit,
    unread_of_model,
)
from kvarena.experiments.kit.panels import Panel, curves, drawn, ratio
from kvarena.harness.measured.calibration import StreamingRead
from kvarena.harness.record.record import Frames, Measured, Recorder
from kvarena.harness.record.statistics import median_interval
from kvarena.harness.record.summary import SummaryRow, row
from kvarena.harness.run.published import named
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System
from kvarena.kernels.arrangement import Arrangement
from kvarena.kernels.layout import Layout
from kvarena.kernels.registry import get_kernel, kernel_spec

HEADLINE = "attention_kernel_latency_vs_context"
FIGURE = "fig18a"
READS = {"measured": ("model", "device", "threads")}


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
    def tables(self) -> str:
        """How its tables point, if it has any."""
        block, scattered = self.arrangement
        return "none" if block is None else "scattered" if scattered else "in order"

    @property
    def system(self) -> System:
        """Named `<allocator>/<kernel>`; blocks lie scattered unless it says otherwise."""
        allocator = allocator_named("static" if self.tables == "none" else "paged")
        return kernel_over(allocator, self.kernel, "paged-in-order" if self.tables == "in order" else None)


def unread(run: Run[Params]) -> dict[str, str]:
    """Keys that this run does not read, and what to write instead."""
    both = {"params.block_sizes": "no kernel of this run reads rows and blocks alike; params.kernels=null takes all"}
    return unread_of_model(run) | ({} if _of_both_layouts(run) else both)


def measure(run: Run[Params], recorder: Recorder) -> Measured:
    """Measure every batch size and context, and every block size at the largest of them."""
    params: Params = run.params
    _check(params)
    lines, by_block = _lines(run), _lines_by_block(run)
    read = StreamingRead(torch.device(run.device.kind))
    parts = [(lines, False, batch, context) for batch in params.batch_sizes for context in params.contexts]
    if by_block:
        parts.append((by_block, True, max(params.batch_sizes), max(params.contexts)))
    cells = [
        Cell(f"{batch}x{context}{'-by-block' * sized}", partial(measure_lines, run, read, of_cell, batch, context),
             {"by_block": sized})
        for of_cell, sized, batch, context in parts
    ]  # fmt: skip
    return Measured(run_cells(run.experiment, recorder, cells))


def summarize(run: Run[Params], frames: Frames) -> Iterator[SummaryRow]:
    """Latency by context, over that of rows and of the device's memory; time by block size."""
    samples = frames["samples"]
    yield from _context_rows(run, samples[~samples.by_block])
    yield from _block_rows(run, samples[samples.by_block])


def _check(params: Params) -> None:
    for key in ("batch_sizes", "contexts"):
        values = getattr(params, key)
        if not values or min(values) < 1 or len(set(values)) < len(values):
            raise UserError(f"params.{key}={values}: name at least one, each 1 or more, and none twice")
    if params.rounds < 1:
        raise UserError(f"params.rounds={params.rounds}: at least 1 is needed")


def _lines(run: Run[Params]) -> list[Line]:
    """Every kernel on rows, scattered blocks and blocks in order, as it can read them. Raises UserError for none."""
    arrangements = (Arrangement(None), Arrangement(USUAL_BLOCK, scattered=True), Arrangement(USUAL_BLOCK))
    lines = [Line(name, a) for name in _kernels(run) for a in arrangements if _misfit(run, name, a) is None]
    if not lines:
        raise UserError(
            f"params.kernels={run.params.kernels}: none that runs here reads rows of {run.model.name}, or blocks of "
            f"{USUAL_BLOCK} tokens"
        )
    return lines


def _lines_by_block(run: Run[Params]) -> list[Line]:
    """Kernels that read rows and blocks alike, on scattered blocks of every size. Raises UserError for odd sizes."""
    pairs = _of_both_layouts(run)
    if pairs:
        check_table_sizes(run.params.block_sizes, max(USUAL_BLOCK, *run.params.contexts))
    sizes = [Arrangement(size, scattered=True) for size in run.params.block_sizes]
    return [Line(name, a) for name in pairs for a in sizes if _misfit(run, name, a) is None]


def _of_both_layouts(run: Run[Params]) -> list[str]:
    return [name for name in _kernels(run) if len(kernel_spec(name).layouts) > 1]


def _kernels(run: Run[Params]) -> list[str]:
    return kernels_here(run, run.params.kernels, *Layout)


def _misfit(run: Run[Params], name: str, arrangement: Arrangement) -> str | None:
    return misfit(run, name, arrangement.layout, arrangement.block_size)


def measure_lines(
    run: Run[Params],
    read: StreamingRead,
    lines: list[Line],
    batch: int,
    context: int,
    refused: Callable[[Line, Exception], None] | None = None,
) -> Frames:
    """Seconds of one call, a row for each line and round; each round begins with another line.

    `refused` hears of lines whose kernel does not take what it is handed (by default: `left_out`).
    """
    device = torch.device(run.device.kind)
    working_set = WorkingSet(run.model, batch, context, run.params.working_set_bytes, device)

    def timer(line: Line) -> Timer:
        kernel = get_kernel(line.kernel)
        return seconds_per_call(working_set.calls(kernel, line.arrangement), device, kernel.spec.in_graph)

    timers = timers_of(lines, timer, refused or left_out(run.params.kernels))
    lines = list(timers)
    rows = []
    for number in range(run.params.rounds):
        limit = read.gb_per_s(repetitions=1)
        turn = number % len(lines)
        for line in [*lines[turn:], *lines[:turn]]:
            rows.append(
                {"batch": batch, "context": context, "round": number, "kernel": line.kernel,
                 "block_size": line.arrangement.block_size, "scattered": line.arrangement.scattered,
                 "call_s": timers[line](), "bytes": working_set.bytes_per_call, "streaming_gb_per_s": limit}
            )  # fmt: skip
    return {"samples": pd.DataFrame(rows).astype({"block_size": float})}


def line_of(kernel: object, block_size: object, scattered: object) -> Line:
    """A line as the samples have it: a block size of 0 is none."""
    return Line(str(kernel), Arrangement(int(float(str(block_size))) or None, bool(scattered)))


def _context_rows(run: Run[Params], samples: pd.DataFrame) -> Iterator[SummaryRow]:
    samples = samples.fillna({"block_size": 0})
    for (batch, context), cell in samples.groupby(["batch", "context"], sort=False):
        by_line = {
            line_of(*key): rows.set_index("round")
            for key, rows in cell.groupby(["kernel", "block_size", "scattered"], sort=False)
        }
        for line, rows in by_line.items():
            names = partial(named, run, line.system, detail=f"bs{batch}", x=float(str(context)))
            yield row(median_interval(1e6 * rows.call_s), quantity=HEADLINE, unit="us",
                      **names(FIGURE, key="vLLM", batch=int(str(batch)), tables=line.tables))  # fmt: skip
            share = 100 * rows.bytes / rows.call_s / 1e9 / rows.streaming_gb_per_s
            yield row(
                median_interval(share), quantity="kv_read_share_of_streaming_read_vs_context", unit="%", **names()
            )
            on_rows = by_line.get(line_of(line.kernel, 0, False))
            if on_rows is not None and line.tables != "none":
                yield row(median_interval(rows.call_s / on_rows.call_s), quantity="time_over_contiguous_vs_context",
                          unit="ratio", **names())  # fmt: skip


def _block_rows(run: Run[Params], samples: pd.DataFrame) -> Iterator[SummaryRow]:
    """Time by block size, over that of blocks of 16: `params.kernel_cost` of experiment=block_size takes these."""
    for kernel, rows in samples.groupby("kernel", sort=False):
        usual = rows[rows.block_size == USUAL_BLOCK].set_index("round").call_s
        for size, part in rows.groupby("block_size"):
            of_size = line_of(kernel, size, True)
            detail = f"bs{part.batch.iloc[0]}, {part.context.iloc[0]} tokens"
            yield row(median_interval(part.set_index("round").call_s / usual), unit="ratio",
                      quantity="time_over_block_16_vs_block_size",
                      **named(run, of_size.system, detail=detail, x=of_size.arrangement.block_size))  # fmt: skip


PANELS = (
    Panel(curves, HEADLINE, "one call, us", "context, tokens", "attention by context", doubling=True),
    Panel(ratio, "time_over_contiguous_vs_context", "time over rows, same kernel", "context, tokens",
          f"blocks of {USUAL_BLOCK} over rows", doubling=True),
    Panel(ratio, "time_over_block_16_vs_block_size", f"time over blocks of {USUAL_BLOCK}", "block size, tokens",
          "scattered blocks", doubling=True),
)  # fmt: skip
draw = partial(drawn, panels=PANELS, width=5.4)
