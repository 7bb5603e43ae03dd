"""What a call of the virtual-memory driver costs (vAttention Table 3), and what that depends on.

The paper gives one number per call and page-group, without saying how many page-groups were mapped by then, or had
been created. Here the same calls are also taken with more and more of either, over runs of several page-groups, and
while the device computes. Times are those of the system calls alone, as the driver counts them.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvarena.allocators.sizes import format_bytes
from kvarena.experiments.kit import plots
from kvarena.experiments.vattention import driver_samples
from kvarena.experiments.vattention.driver_calls import KINDS, SYSTEM_CALLS, check_counts, page_groups_of
from kvarena.harness.record.progress import Progress
from kvarena.harness.record.record import Frames, Measured, Recorder
from kvarena.harness.record.statistics import median_interval
from kvarena.harness.record.summary import SummaryRow, published_values, row
from kvarena.harness.run.published import named
from kvarena.harness.run.run import Run

NAME = "vmm_api_latency"
HEADLINE = "api_latency"
FIGURE = "table3"
READS = {"measured": ("device", "threads")}

# name of a sweep -> (quantity, what is on its axis)
SWEEPS = {
    "mapped": ("api_latency_vs_mapped", "addresses already mapped"),
    "created": ("api_latency_vs_created", "page-groups already created"),
    "run": ("api_latency_per_page_group_vs_run", "page-groups in one call of the contract"),
}


@dataclass
class Params:
    """`params.*` of conf/experiment/vmm_api_latency.yaml; null there means: by the profile of the device."""

    page_groups: list[str] = field(default_factory=list)
    mapped: list[int] = field(default_factory=list)  # addresses mapped before the call, beside none
    created: list[int] = field(default_factory=list)  # page-groups created before the call, beside one
    runs: list[int] = field(default_factory=list)  # page-groups mapped, or unmapped, at once
    rounds: int = 0  # interleaved over page-groups or points; the samples of every interval
    calls: int = 0  # per round and point of a sweep, which counts their median


def unread(run: Run[Params]) -> dict[str, str]:
    """Keys that this run does not read: none of its own."""
    return {}


def measure(run: Run[Params], recorder: Recorder) -> Measured:
    """Take every call at every point."""
    params: Params = run.params
    sizes = page_groups_of(params.page_groups)
    check_counts(params, "mapped", "created", "runs", "rounds", "calls")
    with Progress(NAME, 2 + len(SWEEPS)) as progress:
        tables = []
        for name, measure_cell in _cells(run.device.kind, sizes, params).items():
            progress.stage(name)
            tables.append(recorder.cell(name, measure_cell)["samples"].assign(cell=name))
            progress.advance()
    return Measured({"samples": pd.concat(tables, ignore_index=True)})


def summarize(run: Run[Params], frames: Frames) -> Iterator[SummaryRow]:
    """Every call by page-group, alone and beside kernels, and along the sweeps."""
    samples = frames["samples"]
    calls, sizes = SYSTEM_CALLS[run.device.kind], page_groups_of(run.params.page_groups)
    for size, kind in itertools.product(sizes, calls):
        group = format_bytes(size)
        names = partial(named, run, label=calls[kind], detail=group)
        of_kind = samples[(samples.page_group == size) & (samples.kind == kind)]
        alone, beside = (of_kind[of_kind.cell == cell].us for cell in ("calls", "beside-kernels"))
        yield row(median_interval(alone), quantity=HEADLINE, unit="us",
                  **names(figure=FIGURE, key=calls[kind], page_group=group))  # fmt: skip
        yield row(median_interval(beside), quantity="api_latency_beside_kernels", unit="us", **names())
    for cell, (quantity, _) in SWEEPS.items():
        for (x, call), rows in samples[samples.cell == cell].groupby(["x", "kind"], sort=False):
            yield row(median_interval(rows.us), quantity=quantity, unit="us",
                      **named(run, label=calls[str(call)], detail=format_bytes(sizes[0]), x=float(str(x))))  # fmt: skip


def _cells(device: str, sizes: list[int], params: Params) -> dict[str, Callable[[], Frames]]:
    """What is measured, by name of the cell; sweeps use the first size."""
    at = {
        "mapped": ([0, *params.mapped], driver_samples.with_mapped),
        "created": ([1, *params.created], driver_samples.with_created),
        "run": (params.runs, driver_samples.in_runs),
    }
    return {
        "calls": partial(driver_samples.lives, device, sizes, params.rounds),
        "beside-kernels": partial(driver_samples.lives_beside_kernels, device, sizes, params.rounds),
        **{
            name: partial(driver_samples.sweep, params.rounds, points, partial(measure, device, sizes[0], params.calls))
            for name, (points, measure) in at.items()
        },
    }


def draw(summary: pd.DataFrame) -> Figure:
    """Every call as bars, beside Table 3 where some stand for it, and the three sweeps."""
    figure, axes = plots.canvas(2, 3)
    alone = summary[summary.quantity == HEADLINE]
    where = f"{summary.device.iloc[0]}, {summary.clock.iloc[0]}"
    earned = plots.stands_for(alone, FIGURE)
    _bars(axes[0], alone, f"{'vAttention Table 3' if earned else 'calls of the driver'}, this run\n{where}")
    beside = summary[summary.quantity == "api_latency_beside_kernels"]
    _bars(axes[1], beside, f"while kernels run\n{where}")
    for axis, (quantity, label) in zip(axes[2:], SWEEPS.values(), strict=False):
        rows = summary[summary.quantity == quantity]
        _lines(axis, rows)
        each = " per page-group" if "per_page_group" in quantity else ""
        of = f"page-groups of {rows.setup.iloc[0]}, {rows.clock.iloc[0]}"
        axis.set(xlabel=label, ylabel=f"microseconds{each}", title=f"by {label}\n{of}")
    if earned:
        theirs = published_values("vattention", figure=FIGURE)
        theirs = theirs[theirs.panel.isin(alone.panel)]  # of a driver that is ours too
        _bars(axes[-1], theirs.assign(label=theirs.system, setup=theirs.panel), "published: vAttention Table 3, A100")
    return plots.tidy(figure)


def _bars(axis: Axes, rows: pd.DataFrame, title: str) -> None:
    """One group per kind of call, one bar per page-group."""
    kinds = [kind for kind in KINDS if kind in set(map(_kind, rows.label))]
    groups = list(rows.groupby("setup", sort=False))
    for number, (setup, bars) in enumerate(groups):
        offset = 0.8 * (number + 0.5) / len(groups) - 0.4
        axis.bar([kinds.index(_kind(s)) + offset for s in bars.label], bars.value, 0.8 / len(groups),
                 label=str(setup).split(",")[0])  # fmt: skip
    axis.set_xticks(range(len(kinds)), [kind.replace("_", " ") for kind in kinds], rotation=30, ha="right", fontsize=8)
    axis.set_yscale("log")
    axis.set(ylabel="microseconds", title=title, ylim=(0.5, 5 * rows.value.max()))
    axis.legend(fontsize=7, frameon=False, ncols=len(groups))


def _kind(system: str) -> str:
    """Kind of a call, whatever its name: vMemReserve, cuMemAddressReserve and reserve are one."""
    plain = system.split(":")[0].lower().replace("address", "")
    return max((kind for kind in KINDS if plain.endswith(kind.replace("_", ""))), key=len)  # unmap, not map


def _lines(axis: Axes, rows: pd.DataFrame) -> None:
    """Latency by kind of call over whatever grows."""
    for marker, (call, line) in zip(plots.MARKERS, rows.groupby("label", sort=False), strict=False):
        line = line.sort_values("x")
        axis.plot(line.x, line.value, marker=marker, ms=4, label=str(call))
        axis.fill_between(line.x, line.ci_low, line.ci_high, alpha=0.15, lw=0)
    axis.set_xscale("symlog", linthresh=1)
    axis.set_yscale("log")
    axis.legend(fontsize=7, frameon=False)
