"""How fast page-groups can be allocated (vAttention Table 9), and how fast decoding needs them (Fig 4).

Allocating is mapping: the page-groups were created when the server started. Three ways over one pool, GB = 2^30:

    one by one   one page-group a call, as the paper has it             its Table 9
    in runs      so many neighbours a call, as a growing row maps them
    cold         created first: what a driver without a pool would give

The time is the wall's, around a call of our contract, bookkeeping included; a pass over the pool counts its median
call, so that a slice that a busy machine takes away is not the driver's. The need is bytes of K/V per second of decode,
tokens/s times bytes per token, for the paper's models; tokens/s come from a device model. With engine=sarathi2024 the
host's work counts, as fitted on other figures; with engine=lean it costs nothing, which gives an upper bound.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvarena.allocators.sizes import GB, format_bytes, parse_bytes
from kvarena.allocators.vmm.drivers import make_driver
from kvarena.errors import UserError
from kvarena.experiments import plots
from kvarena.experiments.decode_need import decode_need
from kvarena.experiments.driver_calls import check_counts, page_groups_of, shared_columns
from kvarena.harness.progress import Progress
from kvarena.harness.record import Frames, Outcome, Recorder
from kvarena.harness.run import Run
from kvarena.harness.statistics import median_interval
from kvarena.harness.summary import SummaryRow, frame, published_values, row

NAME = "allocation_bandwidth"
HEADLINE = "allocation_bandwidth"
ONE_BY_ONE = "one by one"
TP1 = "TP-1"  # the published panel: one GPU maps for itself


@dataclass
class Params:
    """`params.*` of conf/experiment/allocation_bandwidth.yaml; null there means: by the profile of the device."""

    page_groups: list[str] = field(default_factory=list)
    pool: str = ""  # mapped over and over
    run_groups: int = 0  # page-groups in one call, where they are mapped in runs
    rounds: int = 0  # interleaved over page-groups and ways: the samples of every interval
    need_models: list[str] = field(default_factory=list)  # of conf/model/, for Fig 4
    need_device: str = ""  # of conf/device/
    need_batches: list[int] = field(default_factory=list)
    need_context: int = 0  # tokens of every sequence


def run(run: Run, recorder: Recorder) -> Outcome:
    """Measure what the driver gives and model what decoding takes. Raises UserError for parameters that do not fit."""
    params: Params = run.params
    sizes, pool = page_groups_of(params.page_groups), parse_bytes(params.pool, "params.pool")
    check_counts(params, "run_groups", "rounds", "need_batches", "need_context")
    if any(pool % size or pool < size for size in sizes):
        raise UserError(f"params.pool={params.pool}: not a multiple of every page-group of {params.page_groups}")
    need = decode_need(params.need_models, params.need_device, run.engine, params.need_batches, params.need_context)
    with Progress(NAME, params.rounds + 1) as progress:
        cell = recorder.cell("bandwidth", partial(_measure, run, sizes, pool, progress))
    samples = cell["samples"]
    summary = frame([*_supply(run, samples), *need])
    nothing = pd.DataFrame({"way": pd.Series(dtype=str)})
    return Outcome(summary, nothing, samples, HEADLINE, draw(summary))


def _measure(run: Run, sizes: list[int], pool: int, progress: Progress) -> Frames:
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
            progress.advance()
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


def _supply(run: Run, samples: pd.DataFrame) -> Iterator[SummaryRow]:
    """The paper's panel where a GPU maps one by one as it did, else ours."""
    shared: dict[str, Any] = {"experiment": NAME, "unit": "GB/s", "evidence": "measured", **shared_columns(run)}
    for way in dict.fromkeys(samples.way):
        as_published = way == ONE_BY_ONE and run.device.kind == "cuda"
        for size in dict.fromkeys(samples.page_group):
            rates = samples[(samples.way == way) & (samples.page_group == size)].gb_per_s
            yield row(
                median_interval(rates), quantity=HEADLINE, panel=TP1 if as_published else f"{run.device.kind}, {way}",
                paper="vattention" if way == ONE_BY_ONE else "kvarena", figure="table9" if way == ONE_BY_ONE else NAME,
                system=format_bytes(size), **shared,
            )  # fmt: skip


def draw(summary: pd.DataFrame) -> Figure:
    """Table 9, ours and the paper's; Fig 4, predicted and published."""
    ours = summary[summary.quantity == HEADLINE]
    theirs = published_values("vattention")
    figure, axes = plots.canvas(1, 3, width=5)
    _bars(axes[0], ours, f"this run\n{ours.device.iloc[0]}, {ours.clock.iloc[0]}")
    _bars(axes[1], theirs[theirs.figure == "table9"], "published: vAttention Table 9, A100\n64KB to 256KB: own driver")
    _need(axes[2], summary, theirs[theirs.figure == "fig4"])
    figure.tight_layout()
    return figure


def _bars(axis: Axes, rows: pd.DataFrame, title: str) -> None:
    """One group per page-group, one bar per panel."""
    names, panels = list(dict.fromkeys(rows.system)), list(dict.fromkeys(rows.panel))
    for number, (panel, bars) in enumerate(rows.groupby("panel", sort=False)):
        offset = 0.8 * (number + 0.5) / len(panels) - 0.4
        axis.bar([names.index(name) + offset for name in bars.system], bars.value, 0.8 / len(panels), label=str(panel))
    axis.set_xticks(range(len(names)), names)
    axis.set(ylabel="GB/s (2^30 bytes)", xlabel="page-group", title=title, ylim=(0, 1.3 * rows.value.max()))
    axis.legend(fontsize=7, frameon=False, ncols=2)


def _need(axis: Axes, summary: pd.DataFrame, published: pd.DataFrame) -> None:
    rates = summary[summary.quantity == "kv_allocation_rate_vs_batch"]
    if rates.empty:
        axis.set_visible(False)
        return
    theirs = published[published.quantity == "kv_allocation_rate_vs_batch"]
    for number, (panel, line) in enumerate(rates.groupby("panel", sort=False)):
        colour = f"C{number}"
        axis.plot(line.x, line.value, "-", color=colour, label=f"{panel}, modelled")
        points = theirs[theirs.panel == panel]
        axis.plot(points.x, points.value, "o", ms=4, color=colour, label=f"{panel}, published")
    axis.set(
        xlabel="batch size", ylabel="MB/s (2^20 bytes)", ylim=(0, 1.5 * max(rates.value.max(), theirs.value.max()))
    )
    engine, device = rates.kernel.iloc[0], rates.device.iloc[0]
    axis.set_title(f"K/V that decoding needs (vAttention Fig 4)\nmodelled: engine {engine} on {device}")
    axis.legend(fontsize=7, frameon=False, ncols=2)
