"""Memory that sharing saves (PagedAttention Fig 15): blocks that need not be, of those that there would be without it.

In every iteration: logical = what the running sequences would hold if each had its own, physical = what they hold.

    saving = 1 - 1 / mean over iterations of (logical / physical)

as the artifact takes it, over a window of the replay. vAttention shares whole page-groups, so the same is said of it.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvarena.allocators.usage import LEAVES
from kvarena.errors import UserError
from kvarena.experiments.kit import plots
from kvarena.experiments.kit.cells import Cell, run_cells
from kvarena.experiments.kit.looks import looks
from kvarena.experiments.kit.panels import published_of, title
from kvarena.experiments.kit.quantities import Quantity, columns, rows
from kvarena.experiments.kit.reads import reads
from kvarena.experiments.kit.replay import Replayer, example_of, workload_of
from kvarena.experiments.kit.windows import window_of
from kvarena.experiments.pagedattention.parallel_sampling import unread_of_sequences, with_rows
from kvarena.harness.record.record import Frames, Measured, Recorder
from kvarena.harness.record.summary import SummaryRow
from kvarena.harness.record.time_averages import PS, check_window, window
from kvarena.harness.requests.decoding import DecodingConfig
from kvarena.harness.requests.workload import Workload
from kvarena.harness.run.published import named
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System

HEADLINE = "memory_saving_vs_n"
READS = reads("sharing", "beams", decoding=False)
FIGURE = "fig15"
QUANTITIES = [
    Quantity(HEADLINE, "%", "saving", FIGURE),
    *columns({"logical_gb": "GB", "physical_gb": "GB", "batched_sequences": "sequences"}, "_vs_n"),
]
FEWER = 4  # share of the requests that is tried first
SURVIVAL = "neutral"  # of the beams that are compared (harness/decoding/survival.py)
ASSUMED = (
    "each place of the next beam is filled from a parent drawn uniformly, or as its survival says; no scores are known"
)
EXTREME = ", survival "  # what tells the setups of other survivals
UNATTACHED = ("stranded", "free", "remainder")  # leaves of the pool that no sequence holds


@dataclass
class Params:
    """`params.*` of conf/experiment/sharing_savings.yaml; null there means: by the profile."""

    n: list[int] = field(default_factory=lambda: [2, 4, 6])  # samples, or the width of a beam
    window_s: list[float] | None = None  # [from, to]; null: the steps that leave someone waiting
    survivals: list[str] = field(default_factory=lambda: [SURVIVAL])  # of beams under clock=modelled
    pool_bytes: int | None = None  # null: the pool the engine ran with
    max_rows: int | None = None  # of vAttention's virtual tensors; null: as its allocator says

    def __post_init__(self) -> None:
        """Refuse what is no window, before anything is replayed."""
        check_window(self.window_s)


def unread(run: Run[Params]) -> dict[str, str]:
    """Keys that this run does not read, and what to write instead."""
    rules = unread_of_sequences(run, run.params.max_rows)
    if run.clock == "measured":
        rules["params.survivals"] = "the model's scores say which beams live on; clock=modelled assumes"
    return rules


def measure(run: Run[Params], recorder: Recorder) -> Measured:
    """One replay for each system, way of decoding and n. Raises UserError for none, or one twice."""
    ways = list(_ways(run))
    if not ways or len(set(ways)) < len(ways):
        raise UserError(
            f"params.n={run.params.n}, params.survivals={run.params.survivals}: at least one n, and nothing twice"
        )
    replayer = Replayer(run, sharing=True)
    cells = [
        Cell(f"{system.name} {way.name} n={way.n} {way.survival}", partial(_cell, run, replayer, system, way))
        for system in with_rows(run.systems, run.params.max_rows)
        for way in ways
    ]
    notes = {"workload": example_of(run).provenance, "survival": ASSUMED}
    return Measured(run_cells(run.experiment, recorder, cells), notes)


def _ways(run: Run[Params]) -> Iterator[DecodingConfig]:
    survivals = [SURVIVAL] if run.clock == "measured" else run.params.survivals
    for n in run.params.n:
        yield DecodingConfig("parallel", n=n)
        for survival in survivals:
            yield DecodingConfig("beam", n=n, survival=survival)


def _cell(run: Run[Params], replayer: Replayer, system: System, decoding: DecodingConfig) -> Frames:
    workload = workload_of(run)
    bounds_s = window_of(run, workload, run.params.window_s)
    steps = window(_steps(replayer, system, workload, decoding, bounds_s), bounds_s)
    said = {"system": system.name, "decoding": decoding.name, "n": decoding.n, "survival": decoding.survival}
    return {"savings": pd.DataFrame([{**said, **savings(steps)}])}


def _steps(
    replayer: Replayer, system: System, workload: Workload, decoding: DecodingConfig, bounds_s: list[float] | None
) -> pd.DataFrame:
    """The step log, exact up to the end of the window: whoever still waits then need not be served.

    Serves the first requests to arrive, and more of them until one of those waits at the end of the window.
    """
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


def summarize(run: Run[Params], frames: Frames) -> Iterator[SummaryRow]:
    """A row of the figure for each system, way and n, and the bytes behind it."""
    for _, cell in frames["savings"].groupby(frames["savings"].index, sort=False):
        yield from _rows(run, cell)


def _rows(run: Run[Params], cell: pd.DataFrame) -> Iterator[SummaryRow]:
    """Beams are compared under one survival model; the others stand beside it under their own names."""
    way, survival, n = cell.decoding.iloc[0], cell.survival.iloc[0], float(cell.n.iloc[0])
    system = next(system for system in run.systems if system.name == cell.system.iloc[0])
    what = way if survival == SURVIVAL else f"{way}{EXTREME}{survival}"
    names = partial(named, run, system, detail=what, x=n, assuming=ASSUMED if way == "beam" else "", decoding=way,
                    survival=survival)  # fmt: skip
    yield from rows(QUANTITIES, cell, names)


def draw(summary: pd.DataFrame) -> Figure:
    """Fig 15: left samples, right beams, with the extremes of survival as whiskers where they were replayed."""
    saving = summary[summary.quantity == HEADLINE]
    extreme = saving.setup.str.contains(EXTREME)
    base = saving.setup.str.replace(f"{EXTREME}\\w+", "", regex=True)
    setups = list(dict.fromkeys(saving[~extreme].setup)) or list(dict.fromkeys(base))
    figure, axes = plots.canvas(1, len(setups), width=4.8, height=3.8)
    for axis, setup in zip(axes, setups, strict=True):
        _bars(axis, saving[saving.setup == setup], saving[extreme & (base == setup)])
    axes[0].legend(fontsize=7, frameon=False)
    top = max(10.0, 1.15 * float(saving.value.max()))
    for axis in axes:
        axis.set_ylim(0, top)
    figure.tight_layout()
    return figure


def _bars(axis: Axes, ours: pd.DataFrame, band: pd.DataFrame) -> None:
    """A bar for each system and n in its allocator's colour, the second of an allocator paler than the first."""
    shown, counts, theirs = looks(ours), sorted(set(ours.x)), published_of(ours)
    width = 0.8 / len(shown)
    seen = Counter[str]()
    for i, (label, look) in enumerate(shown.items()):
        place = {x: counts.index(x) + (i - (len(shown) - 1) / 2) * width for x in counts}
        rows, rings = ours[ours.label == label], theirs[(theirs.label == label) & theirs.x.isin(counts)]
        axis.bar(rows.x.map(place), rows.value, width, color=look.colour, alpha=0.65 ** seen[look.colour],
                 label=look.name)  # fmt: skip
        axis.plot(rings.x.map(place), rings.value, "o", mfc="none", color=look.colour)
        seen[look.colour] += 1
        for x, value in zip(rows.x, rows.value, strict=True):
            extremes = band[(band.label == label) & (band.x == x)].value
            axis.annotate(f"{value:.3g}", (place[x], max([value, *extremes])), ha="center", va="bottom", fontsize=6)
            if len(extremes):
                axis.vlines(place[x], extremes.min(), extremes.max(), color="#000000", lw=1)
    axis.set_xticks(range(len(counts)), [f"{x:g}" for x in counts])
    title(axis, ours, "", "black: between survivals one and all" if len(band) else "")
    axis.set(xlabel="samples, or width of the beam", ylabel="memory saved by sharing, %")
