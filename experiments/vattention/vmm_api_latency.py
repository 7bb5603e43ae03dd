"""What a call of the virtual-memory driver costs (vAttention Table 3), and what that depends on.

The paper gives one number per call and page-group, without saying how many page-groups were mapped by then, or had
been created. Here the same calls are also taken with more and more of either, over runs of several page-groups, and
while the device computes. Times are taken around each call, and all drivers work in one context. What Python adds is in
them: a call that does nothing says how much (`api_latency_floor`), some microseconds where the paper has one or two.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import pandas as pd
from matplotlib.axes import Axes

from kvarena.allocators.sizes import format_bytes
from kvarena.allocators.vmm.drivers import lasting_context
from kvarena.experiments.kit.cells import Cell, run_cells
from kvarena.experiments.kit.panels import Panel, curves, drawn, grouped
from kvarena.experiments.kit.quantities import Quantity, rows
from kvarena.experiments.vattention import driver_samples
from kvarena.experiments.vattention.driver_calls import SYSTEM_CALLS, check_counts, page_groups_of
from kvarena.harness.record.record import Frames, Measured, Recorder
from kvarena.harness.record.statistics import median_interval
from kvarena.harness.record.summary import SummaryRow, row
from kvarena.harness.run.published import named
from kvarena.harness.run.run import Run

HEADLINE = "api_latency"
FIGURE = "table3"
IDLE = "a call that does nothing"
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
    with lasting_context(run.device.kind):
        return Measured(run_cells(run.experiment, recorder, _cells(run.device.kind, sizes, params)))


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
    floor = samples[(samples.kind == "idle") & (samples.cell == "calls")].us
    yield from rows([Quantity("api_latency_floor", "us", "us")], floor.to_frame(), partial(named, run, label=IDLE))
    for cell, (quantity, _) in SWEEPS.items():
        for (x, call), at in samples[samples.cell == cell].groupby(["x", "kind"], sort=False):
            yield row(median_interval(at.us), quantity=quantity, unit="us",
                      **named(run, label=calls[str(call)], detail=format_bytes(sizes[0]), x=float(str(x))))  # fmt: skip


def _cells(device: str, sizes: list[int], params: Params) -> list[Cell]:
    """What is measured; sweeps use the first size."""
    lives = partial(driver_samples.lives, device, sizes, params.rounds)
    beside = partial(driver_samples.lives_beside_kernels, device, sizes, params.rounds)
    at = {
        "mapped": ([0, *params.mapped], driver_samples.with_mapped),
        "created": ([1, *params.created], driver_samples.with_created),
        "run": (params.runs, driver_samples.in_runs),
    }
    sweeps = {
        name: partial(driver_samples.sweep, params.rounds, points, partial(take, device, sizes[0], params.calls))
        for name, (points, take) in at.items()
    }
    cells = {"calls": lives, "beside-kernels": beside, **sweeps}
    return [Cell(name, measure, {"cell": name}) for name, measure in cells.items()]


def _calls(axis: Axes, rows: pd.DataFrame) -> None:
    """A bar for each call and page-group."""
    grouped(axis, rows)
    axis.set_yscale("log")


def _growing(axis: Axes, rows: pd.DataFrame) -> None:
    """Latency over whatever grows."""
    axis.set_yscale("log")
    curves(axis, rows)
    axis.set_xscale("symlog", linthresh=1)
    axis.set_xlim(rows.x.min(), None)


PANELS = (
    Panel(_calls, HEADLINE, "microseconds", what="calls of the driver", by_setup=False),
    Panel(_calls, "api_latency_beside_kernels", "microseconds", what="calls while kernels run", by_setup=False),
    *(
        Panel(_growing, quantity, f"microseconds{' per page-group' if name == 'run' else ''}", grows, f"by {grows}")
        for name, (quantity, grows) in SWEEPS.items()
    ),
)
draw = partial(drawn, panels=PANELS)
