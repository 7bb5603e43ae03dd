"""The size of vAttention's page-groups: what they hold (Tables 8, 10), what small ones cost a kernel (Fig 14), and how
many requests they let run at once (Fig 15).

Fig 15 is predicted: chats of the OpenChat data set arrive at 7 requests/s, which is more than the server can take, and
the largest batch is counted. The paper does not say how long the trace was, or how its lengths were cut.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pandas as pd

from kvarena.allocators.options import unit_option
from kvarena.errors import UserError
from kvarena.experiments.kit.cells import Cell, run_cells
from kvarena.experiments.kit.kernel_pairs import kernels_here
from kvarena.experiments.kit.panels import Panel, bars, drawn, ratio
from kvarena.experiments.kit.published_models import by_model, model_columns, unread_models
from kvarena.experiments.kit.quantities import Quantity, rows
from kvarena.experiments.kit.reads import reads
from kvarena.experiments.kit.seeds import seeds_of, unread_seeds
from kvarena.experiments.vattention import page_group_batch, page_group_kernels
from kvarena.experiments.vattention.driver_calls import check_counts, page_groups_of
from kvarena.experiments.vattention.page_group_batch import CHANGED, Params, Variant
from kvarena.experiments.vattention.page_group_kernels import Point
from kvarena.experiments.vattention.page_group_tables import token_rows
from kvarena.harness.record.record import Frames, Measured, Recorder
from kvarena.harness.record.statistics import median_interval
from kvarena.harness.record.summary import SummaryRow, row
from kvarena.harness.run.published import label_of, named
from kvarena.harness.run.run import Run
from kvarena.kernels.layout import Layout

HEADLINE = "max_batch_vs_page_group"
ASSUMED = "The trace's length and how its chats were cut are not published; 8192 tokens, and as long as the run says."
READS = reads()
_FIG14 = ("compared", "prefill_contexts", "decode_context", "decode_batches", "rounds")


def unread(run: Run[Params]) -> dict[str, str]:
    """Keys that this run does not read, and what to write instead."""
    units = "params.page_groups, params.sliced_page_groups and params.block_sizes set the units"
    keys = unread_models(run, run.params.gpus, "gpus") | {f"allocator.{each}": units for each in CHANGED}
    keys |= unread_seeds(run)
    if run.clock == "modelled":
        keys |= {f"params.{each}": "a device model knows nothing of it; clock=measured times kernels"
                 for each in ("kernels", *_FIG14)}  # fmt: skip
    elif not run.params.kernels:
        keys |= {f"params.{each}": "params.kernels names none" for each in _FIG14}
    have = {unit_option(s.allocator) for s in run.systems} - {None}
    if have == {"page_group"}:
        keys["params.block_sizes"] = "no system of this run has blocks"
    if have == {"block_size"}:
        keys |= {
            f"params.{each}": "no system of this run has page-groups" for each in ("page_groups", "sliced_page_groups")
        }
    return keys


def measure(run: Run[Params], recorder: Recorder) -> Measured:
    """Time kernels where they are real, and replay."""
    _check(run)
    replays = itertools.product(page_group_batch.served(run), page_group_batch.variants(run), seeds_of(run))
    cells = [
        Cell(f"{one.model.name}-{variant.key}-{seed}", partial(page_group_batch.measure, one, variant, seed),
             model_columns(one))
        for one, variant, seed in replays
    ]  # fmt: skip
    return Measured(run_cells(run.experiment, recorder, [*_kernel_cells(run), *cells]), {"assumed": ASSUMED})


def _kernel_cells(run: Run[Params]) -> Iterator[Cell]:
    params = run.params
    for kernel in params.kernels if run.clock == "measured" else ():
        sizes = page_groups_of(params.compared, "params.compared")
        take = partial(page_group_kernels.measure, run.model, kernel, params.points(), sizes, params.rounds)
        yield Cell(f"kernel-{kernel}", partial(take, run.device.kind), {"kernel": kernel})


def _check(run: Run[Params]) -> None:
    params: Params = run.params
    seeds_of(run)
    if run.clock == "modelled":
        return
    check_counts(params, "prefill_contexts", "decode_context", "decode_batches", "rounds")
    sizes = page_groups_of(params.compared, "params.compared")
    if len(sizes) != 2 or sizes[0] >= sizes[1]:
        raise UserError(f"params.compared={params.compared}: two page-groups are needed, the smaller first")
    kernels_here(run, params.kernels, Layout.CONTIGUOUS)


def summarize(run: Run[Params], frames: Frames) -> Iterator[SummaryRow]:
    """Tables 8 and 10, Fig 14 where kernels are real, and Fig 15."""
    yield from token_rows(run)
    units = page_group_batch.variants(run)
    for one, points in by_model(run, frames["points"]):
        of_unit = [points[(points.system == v.system.shown_allocator) & (points.kernel == v.system.kernel.name)]
                   for v in units]  # fmt: skip
        for variant, own in zip(units, of_unit, strict=True):
            yield from _batch_rows(one, variant, own, of_unit[0])
    if "kernel_calls" in frames:
        yield from _kernel_rows(run, frames["kernel_calls"])


def _batch_rows(run: Run[Params], variant: Variant, points: pd.DataFrame, first: pd.DataFrame) -> Iterator[SummaryRow]:
    """The largest batch, and, seed by seed, over that of the first unit listed."""
    quantities = (
        Quantity(HEADLINE, "requests", "max_batch", "fig15"),
        Quantity("mean_batch_while_waiting_vs_page_group", "requests", "mean_batch"),
        Quantity(f"max_batch_over_{first.unit.iloc[0]}", "ratio", "over_first"),
    )
    own = points.assign(over_first=points.max_batch.to_numpy() / first.max_batch.to_numpy())
    label = label_of(run, variant.system)
    return rows(quantities, own, partial(named, run, variant.listed, key=variant.unit, label=label, assuming=ASSUMED))


def _kernel_rows(run: Run[Params], calls: pd.DataFrame) -> Iterator[SummaryRow]:
    """Time over the smaller page-groups over that over the larger, round by round."""
    small, large = page_groups_of(run.params.compared)
    alone = replace(run, reads=("model", "device"))  # no request is served
    for (kernel, *_), cell in calls.groupby(["kernel", *Point._fields], sort=False):
        seconds = cell.pivot(index="round", columns="page_group", values="call_s")
        first = cell.iloc[0]
        point = Point(str(first.phase), int(first.batch), int(first.context))
        decode = point.phase == "decode"
        names = named(
            alone, None, "fig14", key="FA2 decode 32K" if decode else "FA2 prefill",
            label=f"{kernel} {point.phase}{f' {point.context}' if decode else ''}", x=point.x, kernel=str(kernel),
            decode_context=point.context if decode else 32768,
        )  # fmt: skip
        names |= {"allocator": "vattention", "kernel": str(kernel)}
        quantity = f"kernel_time_{'_over_'.join(run.params.compared)}_vs_{'batch' if decode else 'context'}"
        yield row(median_interval(seconds[small] / seconds[large]), quantity=quantity, unit="ratio", **names)


OVER = "kernel time, small over large groups"
PANELS = (
    Panel(bars, HEADLINE, "requests at once, at most", what="largest batch"),
    Panel(ratio, "kernel_time_.*_vs_context", OVER, "context, tokens", "prefill", doubling=True),
    Panel(ratio, "kernel_time_.*_vs_batch", OVER, "batch size", "decode", doubling=True),
)
draw = partial(drawn, panels=PANELS)
