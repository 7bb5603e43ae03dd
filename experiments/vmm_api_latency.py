"""What a call of the virtual-memory driver costs (vAttention Table 3), and what that depends on.

The paper gives one number per call and page-group, without saying how many page-groups were mapped by then, or had
been created. Here the same calls are also taken with more and more of either, over runs of several page-groups, and
while the device computes. Times are those of the system calls alone, as the driver counts them.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvarena.allocators.sizes import format_bytes
from kvarena.experiments import driver_samples, plots
from kvarena.experiments.driver_calls import KINDS, SYSTEM_CALLS, check_counts, page_groups_of, shared_columns
from kvarena.harness.progress import Progress
from kvarena.harness.record import Frames, Outcome, Recorder
from kvarena.harness.run import Run
from kvarena.harness.statistics import median_interval
from kvarena.harness.summary import SummaryRow, frame, published_values, row

NAME = "vmm_api_latency"
HEADLINE = "api_latency"

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


def run(run: Run, recorder: Recorder) -> Outcome:
    """Take every call at every point."""
    params: Params = run.params
    sizes = page_groups_of(params.page_groups)
    check_counts(params, "mapped", "created", "runs", "rounds", "calls")
    with Progress(NAME, 2 + len(SWEEPS)) as progress:
        frames = []
        for name, measure in _cells(run.device.kind, sizes, params).items():
            progress.stage(name)
            frames.append(recorder.cell(name, measure)["samples"].assign(cell=name))
            progress.advance()
    samples = pd.concat(frames, ignore_index=True)
    summary = frame(_summary(run, samples))
    nothing = pd.DataFrame({"cell": pd.Series(dtype=str)})
    return Outcome(summary, nothing, samples, HEADLINE, draw(summary))


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


def _summary(run: Run, samples: pd.DataFrame) -> Iterator[SummaryRow]:
    calls = SYSTEM_CALLS[run.device.kind]
    shared: dict[str, Any] = {"experiment": NAME, "unit": "us", "evidence": "measured", **shared_columns(run)}
    for cell, quantity, paper, figure in (
        ("calls", HEADLINE, "vattention", "table3"),
        ("beside-kernels", "api_latency_beside_kernels", "kvarena", NAME),
    ):
        taken = samples[samples.cell == cell]
        for size, kind in itertools.product(page_groups_of(run.params.page_groups), calls):
            us = taken[(taken.page_group == size) & (taken.kind == kind)].us
            yield row(
                median_interval(us), paper=paper, figure=figure, panel=format_bytes(size), system=calls[kind],
                quantity=quantity, **shared,
            )  # fmt: skip
    panel = format_bytes(page_groups_of(run.params.page_groups)[0])
    for cell, (quantity, _) in SWEEPS.items():
        for (x, name), rows in samples[samples.cell == cell].groupby(["x", "kind"], sort=False):
            yield row(
                median_interval(rows.us), paper="kvarena", figure=NAME, panel=panel, system=calls[str(name)],
                quantity=quantity, x=x, **shared,
            )  # fmt: skip


def draw(summary: pd.DataFrame) -> Figure:
    """Table 3 as bars, ours and the paper's, and the three sweeps."""
    device = f"{summary.device.iloc[0]}, {summary.clock.iloc[0]}"
    theirs = published_values("vattention", figure="table3")
    figure, axes = plots.canvas(2, 3)
    for axis, quantity, title in (
        (axes[0], HEADLINE, "this run"),
        (axes[1], "api_latency_beside_kernels", "this run, while kernels run"),
    ):
        _bars(axis, summary[summary.quantity == quantity], f"{title}\n{device}")
    _bars(axes[2], theirs, "published: vAttention Table 3, A100\n64KB to 256KB: vMem* of their own driver")
    for axis, (quantity, label) in zip(axes[3:], SWEEPS.values(), strict=True):
        rows = summary[summary.quantity == quantity]
        _lines(axis, rows)
        axis.set(xlabel=label, ylabel="microseconds", title=f"page-groups of {rows.panel.iloc[0]}\n{device}")
    figure.tight_layout()
    return figure


def _bars(axis: Axes, rows: pd.DataFrame, title: str) -> None:
    """One group per kind of call, one bar per page-group."""
    kinds = [kind for kind in KINDS if kind in set(map(_kind, rows.system))]
    panels = list(dict.fromkeys(rows.panel))
    for number, (panel, bars) in enumerate(rows.groupby("panel", sort=False)):
        offset = 0.8 * (number + 0.5) / len(panels) - 0.4
        axis.bar([kinds.index(_kind(s)) + offset for s in bars.system], bars.value, 0.8 / len(panels), label=str(panel))
    axis.set_xticks(range(len(kinds)), [kind.replace("_", " ") for kind in kinds], rotation=30, ha="right", fontsize=8)
    axis.set_yscale("log")
    axis.set(ylabel="microseconds", title=title, ylim=(0.5, 5 * rows.value.max()))
    axis.legend(fontsize=7, frameon=False, ncols=len(panels))


def _kind(system: str) -> str:
    """Kind of a call, whatever its name: vMemReserve, cuMemAddressReserve and reserve are one."""
    plain = system.split(":")[0].lower().replace("address", "")
    return max((kind for kind in KINDS if plain.endswith(kind.replace("_", ""))), key=len)  # unmap, not map


def _lines(axis: Axes, rows: pd.DataFrame) -> None:
    """Latency by kind of call over whatever grows."""
    for marker, (system, line) in zip(plots.MARKERS, rows.groupby("system", sort=False), strict=False):
        line = line.sort_values("x")
        axis.plot(line.x, line.value, marker=marker, ms=4, label=str(system))
        axis.fill_between(line.x, line.ci_low, line.ci_high, alpha=0.15, lw=0)
    axis.set_xscale("symlog", linthresh=1)
    axis.set_yscale("log")
    axis.legend(fontsize=7, frameon=False)
