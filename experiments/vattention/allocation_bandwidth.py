"""How fast page-groups can be allocated (vAttention Table 9), and how fast decoding needs them (Fig 4).

Allocating is mapping: the page-groups were created when the server started. Three ways over one pool, GB = 2^30:

    one by one   one page-group a call, as the paper has it             its Table 9
    in runs      so many neighbours a call, as a growing row maps them
    cold         created first: what a driver without a pool would give

The time is the wall's, around a call of our contract, bookkeeping included; a pass over the pool counts its median
call, so that a slice that a busy machine takes away is not the driver's. The need is bytes of K/V per second of decode,
tokens/s times bytes per token, for the paper's models; tokens/s come from a device model. With the engine sarathi2024
the host's work counts, as fitted on other figures; with lean it costs nothing, which gives an upper bound.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from statistics import median
from time import perf_counter

import pandas as pd

from kvarena.allocators.sizes import GB, format_bytes, parse_bytes
from kvarena.allocators.vmm.drivers import make_driver
from kvarena.errors import UserError
from kvarena.experiments.kit.cells import Cell, run_cells
from kvarena.experiments.kit.panels import Panel, curves, drawn, grouped
from kvarena.experiments.vattention.decode_need import Params, decode_need, need_rows
from kvarena.experiments.vattention.driver_calls import check_counts, page_groups_of
from kvarena.harness.record.record import Frames, Measured, Recorder
from kvarena.harness.record.statistics import median_interval
from kvarena.harness.record.summary import SummaryRow, row
from kvarena.harness.run.published import named
from kvarena.harness.run.run import Run

HEADLINE = "allocation_bandwidth"
FIGURE = "table9"
READS = {"measured": ("device",)}
ONE_BY_ONE = "one by one"


def unread(run: Run[Params]) -> dict[str, str]:
    """Keys that this run does not read, and what to write instead."""
    keys = {"engine": "params.need_engine=NAME is the engine that decoding is modelled by"}
    if not run.params.need_models:
        for key in ("need_device", "need_engine", "need_batches", "need_context"):
            keys[f"params.{key}"] = "params.need_models=[] models nothing"
    return keys


def measure(run: Run[Params], recorder: Recorder) -> Measured:
    """Model what decoding takes and measure what the driver gives. Raises UserError for parameters that do not fit."""
    params: Params = run.params
    sizes, pool = page_groups_of(params.page_groups), parse_bytes(params.pool, "params.pool")
    check_counts(params, "run_groups", "rounds", "need_batches", "need_context")
    if any(pool % size or pool < size for size in sizes):
        raise UserError(f"params.pool={params.pool}: not a multiple of every page-group of {params.page_groups}")
    if len(set(params.need_models)) < len(params.need_models):
        raise UserError(f"params.need_models={params.need_models}: one is named twice")
    need = decode_need(run)
    measured = run_cells(run.experiment, recorder, [Cell("bandwidth", partial(_measure, run, sizes, pool))])
    return Measured(measured if need.empty else {**measured, "decode_need": need})


def summarize(run: Run[Params], frames: Frames) -> Iterator[SummaryRow]:
    """GB/s by page-group and way, and what decoding takes."""
    yield from _supply(run, frames["samples"])
    if "decode_need" in frames:
        yield from need_rows(run, frames["decode_need"])


def _measure(run: Run[Params], sizes: list[int], pool: int) -> Frames:
    """Rounds over page-groups and ways; GB/s of each."""
    ways: dict[str, Callable[[_Pool], float]] = {
        ONE_BY_ONE: partial(_Pool.map_seconds, groups_a_call=1),
        "in runs": partial(_Pool.map_seconds, groups_a_call=run.params.run_groups),
        "cold": _Pool.cold_seconds,
    }
    samples = []
    with ExitStack() as stack:
        pools = [stack.enter_context(closing(_Pool(run.device.kind, size, pool // size))) for size in sizes]
        for number in range(-1, run.params.rounds):
            for groups, (way, seconds) in itertools.product(pools, ways.items()):
                rate = groups.bytes / GB / seconds(groups)
                if number >= 0:  # the first round loads what loads once
                    samples.append({"round": number, "page_group": groups.bytes, "way": way, "gb_per_s": rate})
    return {"samples": pd.DataFrame(samples)}


class _Pool:
    """Page-groups of one size, created ahead, and the addresses to map them to."""

    def __init__(self, device: str, page_group: int, count: int) -> None:
        self.bytes, self._device, self._count = page_group, device, count
        self._driver = make_driver(device, page_group)
        try:
            self._base = self._driver.reserve(count * page_group)
            self._handles = self._driver.create(count)
        except BaseException:
            self._driver.close()
            raise

    def map_seconds(self, groups_a_call: int) -> float:
        """Map all, a few at a time; seconds of one page-group in the median call."""
        taken = []
        for first in range(0, self._count, groups_a_call):
            handles = self._handles[first : first + groups_a_call]
            start = perf_counter()
            self._driver.map(self._base, first * self.bytes, handles)
            taken.append((perf_counter() - start) / len(handles))
        self._driver.unmap(self._base, 0, self._count)
        return median(taken)

    def cold_seconds(self) -> float:
        """Create as many again, each when it is mapped; seconds of one page-group in the median of these."""
        taken = []
        with closing(make_driver(self._device, self.bytes)) as driver:
            base = driver.reserve(self._count * self.bytes)
            for slot in range(self._count):
                start = perf_counter()
                driver.map(base, slot * self.bytes, driver.create(1))
                taken.append(perf_counter() - start)
        return median(taken)

    def close(self) -> None:
        """Give the memory back."""
        self._driver.close()


def _supply(run: Run[Params], samples: pd.DataFrame) -> Iterator[SummaryRow]:
    for (way, size), rows in samples.groupby(["way", "page_group"], sort=False):
        group = format_bytes(int(str(size)))
        yield row(median_interval(rows.gb_per_s), quantity=HEADLINE, unit="GB/s",
                  **named(run, figure=FIGURE, key=group, label=group, detail=str(way), way=way))  # fmt: skip


PANELS = (
    Panel(grouped, HEADLINE, "GB/s (2^30 bytes)", what="page-groups that the driver allocates", by_setup=False),
    Panel(curves, "kv_allocation_rate_vs_batch", "MB/s (2^20 bytes)", "batch size", "K/V that decoding needs"),
)
draw = partial(drawn, panels=PANELS)
