"""Memory that sharing saves (PagedAttention Fig 15): blocks that need not be, of those that there would be without it.

In every iteration: logical = what the running sequences would hold if each had its own, physical = what they hold.

    saving = 1 - 1 / mean over iterations of (logical / physical)

as the artifact takes it, over a window of the replay. vAttention shares whole page-groups, so the same is said of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvarena.allocators.usage import LEAVES
from kvarena.experiments import plots
from kvarena.experiments.averages import PS, window
from kvarena.experiments.parallel_sampling import panel_named, with_rows
from kvarena.experiments.replay import Replayer, columns, workload_of
from kvarena.harness.decoding.config import DecodingConfig
from kvarena.harness.paths import PUBLISHED
from kvarena.harness.progress import Progress
from kvarena.harness.record import Frames, Outcome, Recorder
from kvarena.harness.run import Run
from kvarena.harness.summary import SummaryRow, frame, read_published, row
from kvarena.harness.systems import System

NAME = "sharing_savings"
HEADLINE = "memory_saving_vs_n"
FEWER = 4  # share of the requests that is tried first
SURVIVAL = "neutral"  # of the beams that are compared (harness/decoding/survival.py)
UNATTACHED = ("stranded", "free", "remainder")  # leaves of the pool that no sequence holds


@dataclass
class Params:
    """`params.*` of conf/experiment/sharing_savings.yaml; null there means: by the profile."""

    n: list[int] = field(default_factory=lambda: [2, 4, 6])  # samples, or the width of a beam
    window_s: list[float] | None = None  # [from, to]; null: the steps that leave someone waiting
    survivals: list[str] = field(default_factory=lambda: [SURVIVAL])  # of beams under clock=modelled
    pool_bytes: int | None = None  # null: the pool the engine ran with
    max_rows: int | None = None  # of vAttention's virtual tensors; null: as its allocator says


def run(run: Run, recorder: Recorder) -> Outcome:
    """One replay for each system, way of decoding and n."""
    replayer, cells = Replayer(run), []
    ways = list(_ways(run))
    with Progress(NAME, len(ways) * len(run.systems)) as progress:
        for system in with_rows(run.systems, run.params.max_rows):
            for decoding in ways:
                key = f"{system.name} {decoding.name} n={decoding.n} {decoding.survival}"
                progress.stage(key)
                cells.append(recorder.cell(key, partial(_cell, run, replayer, system, decoding))["savings"])
                progress.advance()
    table = pd.concat(cells, ignore_index=True)
    summary = frame(_rows(run, table))
    notes = {"workload": workload_of(run).provenance, "survival": SURVIVAL}
    return Outcome(summary, pd.DataFrame(), table, HEADLINE, draw(summary), notes)


def _ways(run: Run) -> Iterator[DecodingConfig]:
    survivals = [SURVIVAL] if run.clock == "measured" else run.params.survivals
    for n in run.params.n:
        yield DecodingConfig("parallel", n=n)
        for survival in survivals:
            yield DecodingConfig("beam", n=n, survival=survival)


def _cell(run: Run, replayer: Replayer, system: System, decoding: DecodingConfig) -> Frames:
    steps = window(_steps(run, replayer, system, decoding), run.params.window_s)
    said = {"system": system.name, "decoding": decoding.name, "n": decoding.n, "survival": decoding.survival}
    return {"savings": pd.DataFrame([{**said, **savings(steps)}])}


def _steps(run: Run, replayer: Replayer, system: System, decoding: DecodingConfig) -> pd.DataFrame:
    """The step log, exact up to the end of the window: whoever still waits then need not be served.

    Serves the first requests to arrive, and more of them until one of those waits at the end of the window.
    """
    workload, bounds_s = workload_of(run), run.params.window_s
    count = len(workload) if bounds_s is None else max(1, len(workload) // FEWER)
    while True:
        requests, steps, _ = replayer.serve(system, workload.first(count), decoding)
        if count == len(workload) or (bounds_s and _waited_past(requests, bounds_s[1])):
            return steps
        count = min(2 * count, len(workload))


def _waited_past(requests: pd.DataFrame, end_s: float) -> bool:
    """Whether a request was in line, never admitted, all the time up to `end_s`: the last to arrive."""
    scheduled_ps = requests.scheduled_ps.iloc[-1]
    return bool(pd.notna(scheduled_ps) and scheduled_ps > end_s * PS)


def savings(steps: pd.DataFrame) -> dict[str, float]:
    """Over a window of a step log: `saving`, as the paper takes it, and the plain means of both byte counts.

    Rows are stretches of one or more iterations, of which all sums are taken; iterations without a sequence count for
    nothing.
    """
    held = steps[[leaf for leaf in LEAVES if leaf not in UNATTACHED]].sum(axis=1)
    busy = steps[held > 0]
    physical = held[held > 0]
    logical = physical + busy.shared_bytes
    mean_ratio = float((logical / physical * busy.steps).sum() / busy.steps.sum())
    return {
        "saving": 100 * (1 - 1 / mean_ratio),
        "logical_gb": float(logical.sum() / busy.steps.sum()) / 1e9,
        "physical_gb": float(physical.sum() / busy.steps.sum()) / 1e9,
        "batched_sequences": float(((busy.decodes + busy.prefills) * busy.steps).sum() / busy.steps.sum()),
    }


def _rows(run: Run, table: pd.DataFrame) -> Iterator[SummaryRow]:
    """Beams are compared under one survival model; the others stand beside it under their own names."""
    systems = {system.name: system for system in run.systems}
    published = {"paper": "pagedattention", "figure": "fig15"}
    ours = {"paper": "kvarena", "figure": NAME}
    for _, cell in table.iterrows():
        beam = cell.decoding == "beam"
        compared = cell.survival == SURVIVAL
        shared = {
            "experiment": NAME,
            "panel": panel_named(run, cell.decoding if compared else f"{cell.decoding}, survival {cell.survival}"),
            "x": cell.n,
            "evidence": "measured" if run.clock == "measured" else "conditional" if beam else "predicted",
            **columns(run, systems[cell.system]),
        }
        yield row(cell.saving, quantity=HEADLINE, unit="%", **(published if compared else ours), **shared)
        for name, unit in (("logical_gb", "GB"), ("physical_gb", "GB"), ("batched_sequences", "sequences")):
            yield row(cell[name], quantity=f"{name}_vs_n", unit=unit, **ours, **shared)


def draw(summary: pd.DataFrame) -> Figure:
    """Fig 15: left samples, right beams, with the extremes of survival as whiskers where they were replayed."""
    saving = summary[summary.quantity == HEADLINE]
    extreme = saving.panel.str.contains(", survival ")
    published = read_published(PUBLISHED)
    published = published[(published.figure == "fig15") & (published.quantity == HEADLINE)]
    panels = list(dict.fromkeys(saving[~extreme].panel))
    figure, axes = plots.canvas(1, len(panels), width=4.8, height=3.6)
    for axis, panel in zip(axes, panels, strict=True):
        band = saving[extreme & saving.panel.str.startswith(f"{panel}, ")]
        _bars(axis, saving[saving.panel == panel], band, published[published.panel == panel])
    axes[0].legend(fontsize=7, frameon=False)
    top = max(10.0, 1.15 * float(saving.value.max()))
    for axis in axes:
        axis.set_ylim(0, top)
    figure.tight_layout()
    return figure


SHADES = {"paged": "#0072B2", "64KB": "#009E73", "sliced": "#66C2A5", "2MB": "#B2DFD0"}


def _bars(axis: Axes, ours: pd.DataFrame, band: pd.DataFrame, published: pd.DataFrame) -> None:
    names, counts = list(dict.fromkeys(ours.system)), sorted(set(ours.x))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        rows = ours[ours.system == name].sort_values("x")
        at = [counts.index(x) + (i - (len(names) - 1) / 2) * width for x in rows.x]
        colour = SHADES["paged"] if rows.allocator.iloc[0] == "paged" else _shade(name)
        axis.bar(at, rows.value, width, color=colour, label=name)
        for x, place, value in zip(rows.x, at, rows.value, strict=True):
            extremes = band[(band.system == name) & (band.x == x)].value
            top = max([value, *extremes])
            axis.annotate(f"{value:.3g}", (place, top), ha="center", va="bottom", fontsize=6)
            if len(extremes):
                axis.vlines(place, extremes.min(), extremes.max(), color="#000000", lw=1)
        theirs = published[published.system == name]
        axis.plot([counts.index(x) for x in theirs.x], theirs.value, "o", mfc="none", color=colour)
    axis.set_xticks(range(len(counts)), [f"{x:g}" for x in counts])
    said = ", ".join(dict.fromkeys(str(ours[name].iloc[0]) for name in ("clock", "device", "evidence")))
    axis.set_title(f"{ours.panel.iloc[0]}\n{said}", fontsize=9)
    axis.set(xlabel="samples, or width of the beam", ylabel="memory saved by sharing, %")


def _shade(name: str) -> str:
    return next((colour for part, colour in SHADES.items() if part in name), "#999999")
