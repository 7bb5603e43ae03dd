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

from kvarena.errors import UserError
from kvarena.experiments.kit.attention_time import (
    USUAL_BLOCK,
    Call,
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
from kvarena.experiments.kit.panels import Panel, drawn, ratio
from kvarena.experiments.kit.quantities import Quantity, rows
from kvarena.experiments.vattention.driver_calls import check_counts
from kvarena.experiments.vattention.random_blocks import DrawnBlocks
from kvarena.harness.record.record import Frames, Measured, Recorder
from kvarena.harness.record.summary import SummaryRow
from kvarena.harness.run.published import named
from kvarena.harness.run.run import Run
from kvarena.kernels.arrangement import Arrangement
from kvarena.kernels.layout import Layout
from kvarena.kernels.registry import get_kernel

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
    lines = _lines(run)
    cells = [Cell(f"{batch}", partial(_cell, run, lines, batch)) for batch in run.params.batch_sizes]
    return Measured(run_cells(run.experiment, recorder, cells))


def summarize(run: Run[Params], frames: Frames) -> Iterator[SummaryRow]:
    """Time by block size over that of blocks of 16, the time itself, and the bytes that were touched."""
    samples, paged = frames["samples"], allocator_named("paged")
    for (kernel, tables, batch), cell in samples.groupby(["kernel", "tables", "batch"], sort=False):
        usual = cell[cell.block_size == USUAL_BLOCK].set_index("round").call_s
        for size, part in cell.groupby("block_size"):
            key, own = f"block {size}", part.set_index("round")
            names = partial(
                named, run, kernel_over(paged, str(kernel)), key=key, label=f"{key}/{kernel}",
                detail=f"{run.params.context} tokens, {tables}", x=float(str(batch)), tables=tables,
            )  # fmt: skip
            yield from rows(QUANTITIES[size == USUAL_BLOCK :], own.assign(over_usual=own.call_s / usual), names)


def _lines(run: Run[Params]) -> list[Line]:
    """Kernels, tables and block sizes that fit. Raises UserError where nothing does, or 16 is missing."""
    params: Params = run.params
    check_counts(params, "batch_sizes", "context", "drawn_blocks", "rounds")
    check_table_sizes(params.block_sizes, params.context)
    names = kernels_here(run, params.kernels, Layout.PAGED)
    lines = [
        Line(*line)
        for line in itertools.product(names, TABLES, params.block_sizes)
        if misfit(run, line[0], Layout.PAGED, line[2]) is None
    ]
    if not lines:
        raise UserError(f"params.kernels={params.kernels}: none that runs here reads blocks of {run.model.name}")
    return lines


def _cell(run: Run[Params], lines: list[Line], batch: int) -> Frames:
    """Seconds of one call, a row for each line and round; each round begins with another line."""
    params: Params = run.params
    device = torch.device(run.device.kind)
    equal = WorkingSet(run.model, batch, params.context, params.working_set_bytes, device)
    touched: dict[Line, int] = {}

    def timer(line: Line) -> Timer:
        calls, touched[line] = _calls(run, equal, line, batch, device)
        return seconds_per_call(calls, device, get_kernel(line.kernel).spec.in_graph)

    timers = timers_of(lines, timer, left_out(params.kernels))
    lines, rows = list(timers), []
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


QUANTITIES = (
    Quantity(HEADLINE, "ratio", "over_usual", FIGURE),  # but of blocks of 16 over themselves
    Quantity("decode_kernel_time_vs_batch", "us", lambda own: 1e6 * own.call_s),
    Quantity("working_set_vs_batch", "bytes", lambda own: float(own.touched_bytes.iloc[0]), counted=True),
)
PANELS = (Panel(ratio, HEADLINE, f"time over blocks of {USUAL_BLOCK}", "batch size", "decode kernel by block size",
                doubling=True),)  # fmt: skip
draw = partial(drawn, panels=PANELS)
