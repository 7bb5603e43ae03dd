"""From Orca(Max) to vAttention one idea at a time: what each is worth in requests at once, and in sustained rate.

    orca-max          reserves the longest sequence, in powers of two, contiguously
      estimate        reserve what the request will really need            -> orca-oracle
      rounding        exact sizes instead of powers of two                 -> contiguous
      stranding       slots need not lie together                          -> paged-reserved-1
      reservation     take slots when they are written, preempt if need be -> paged-1
      granularity     take them in larger units, which drivers and kernels want: blocks of 16 (vLLM), page-groups

Each step changes that one thing; what a step is worth depends on those before it. Every seed serves the same trace with
every system, and what is compared is paired by seed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvarena.errors import UserError
from kvarena.experiments.kit.cells import Cell, run_cells
from kvarena.experiments.kit.panels import Panel, bars, drawn
from kvarena.experiments.kit.reads import reads
from kvarena.experiments.kit.replay import Replayer, workload_of
from kvarena.experiments.kit.seeds import seeds_of, unread_seeds
from kvarena.experiments.kit.windows import window_of
from kvarena.harness.record.capacity import capacity, paired_ratio
from kvarena.harness.record.metrics import latencies
from kvarena.harness.record.record import Frames, Measured, Recorder
from kvarena.harness.record.statistics import median_interval
from kvarena.harness.record.summary import SummaryRow, row
from kvarena.harness.record.time_averages import Average, averages, window
from kvarena.harness.requests.workload import Workload
from kvarena.harness.run.named_systems import stated
from kvarena.harness.run.published import named
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System

HEADLINE = "mean_batched_requests"
READS = reads()
MEASURES = {"batch": (HEADLINE, "requests"), "capacity": ("capacity", "req/s")}


@dataclass
class Step:
    """`system` is `origin` with one thing changed."""

    name: str
    origin: str
    system: str


@dataclass
class Params:
    """`params.*` of conf/experiment/waterfall.yaml; null there means: by the profile."""

    steps: list[Step] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)  # at least 6 give a 95 % interval
    window_s: list[float] | None = None  # of the mean batch; null: the steps that leave someone waiting
    limit_s: float | None = None  # s/token, of capacity; null: no search
    capacity_duration_s: float = 0.0  # of the arrivals in that search
    guess: float = 1.0  # requests/s, where the search begins
    tolerance: float = 0.01  # ratio to which it ends
    pool_bytes: int | None = None


def unread(run: Run[Params]) -> dict[str, str]:
    """Keys that this run does not read, and what to write instead."""
    unused = unread_seeds(run)
    if run.params.limit_s is None:
        search = ("capacity_duration_s", "guess", "tolerance")
        unused |= {f"params.{key}": "params.limit_s=SECONDS starts the search for the capacity" for key in search}
    return unused


def measure(run: Run[Params], recorder: Recorder) -> Measured:
    """Serve every seed with every system."""
    seeds = seeds_of(run)
    _check(run)
    replayer, workloads = Replayer(run), {seed: workload_of(run, seed=seed) for seed in seeds}
    cells = [
        Cell(f"{seed}-{system.name}", partial(_cell, run, replayer, system, overload, seed))
        for seed, overload in workloads.items()
        for system in run.systems
    ]
    notes = {"workload": workloads[seeds[-1]].provenance, "seeds": seeds}
    return Measured(run_cells(run.experiment, recorder, cells), notes)


def _check(run: Run[Params]) -> None:
    if run.params.limit_s is not None and run.arrival.rate is None:
        raise UserError("params.limit_s: the search for the capacity needs arrivals drawn at a rate (arrival=)")
    known = [step.name for step in run.params.steps]
    if len(set(known)) < len(known):
        raise UserError(f"params.steps: two steps have one name: {', '.join(known)}")
    there = {system.name for system in run.systems}
    for name in (name for step in run.params.steps for name in (step.origin, step.system)):
        if name not in there:
            stated(name)  # a step whose systems do not run is left out, one whose systems do not exist is refused


def _cell(run: Run[Params], replayer: Replayer, system: System, overload: Workload, seed: int) -> Frames:
    """One system under one seed: the mean batch under overload, and the capacity."""
    params: Params = run.params
    _, steps, _ = replayer.serve(system, overload)
    batch = (
        averages(window(steps, window_of(run, overload, params.window_s)))
        .set_index("average")
        .batch[Average.OVER_ITERATIONS]
    )
    point: dict[str, object] = {
        "system": system.name,
        "seed": seed,
        "batch": batch,
        "preempted": int(steps.preempted.sum()),
    }
    if params.limit_s is not None:

        def latency_at(rate: float) -> float:
            workload = workload_of(run, seed=seed, rate=rate, duration_s=params.capacity_duration_s)
            return float(latencies(replayer.serve(system, workload).requests).normalized_s.mean())

        found = capacity(latency_at, params.limit_s, params.guess, params.tolerance)
        point["capacity"] = (found.rate * found.above) ** 0.5
    return {"points": pd.DataFrame([point])}


def summarize(run: Run[Params], frames: Frames) -> Iterator[SummaryRow]:
    """Every system over the seeds, and what each step is worth, paired."""
    points = frames["points"]
    systems = {system.name: system for system in run.systems}
    for measure, (quantity, unit) in MEASURES.items():
        if measure not in points:
            continue
        by_seed = points.pivot(index="seed", columns="system", values=measure)
        for name, system in systems.items():
            yield row(median_interval(by_seed[name]), quantity=quantity, unit=unit, **named(run, system))
        for step in run.params.steps:
            if step.system in systems and step.origin in systems:
                ratio = paired_ratio(by_seed, step.system, step.origin)
                names = named(run, systems[step.system])
                yield row(ratio, quantity=f"{measure}_ratio:{step.name}", unit="ratio", **names)


def draw(summary: pd.DataFrame) -> Figure:
    """A bar for every system, and on it what it is worth over its origin."""
    said = {"batch": "mean batched requests", "capacity": "capacity, req/s"}
    panels = [
        Panel(_worth, f"{MEASURES[measure][0]}|{measure}_ratio:.*", words, what="one change at a time")
        for measure, words in said.items()
    ]
    return drawn(summary, panels, width=7, height=4.4)


def _worth(axis: Axes, rows: pd.DataFrame) -> None:
    ratios = rows.quantity.str.contains("_ratio:")
    bars(axis, rows[~ratios])
    for number, (_, bar) in enumerate(rows[~ratios].iterrows()):
        steps = rows[ratios & (rows.label == bar.label)]
        names = steps.quantity.str.split(":").str[1].str.replace(", ", "\n").str.replace(" over ", "\nover ")
        worth = [f"{name}\nx {ratio:.2f}" for name, ratio in zip(names, steps.value, strict=True)]
        top = bar.value if pd.isna(bar.ci_high) else bar.ci_high
        axis.annotate("\n".join(worth), (number, top), (0, 14), textcoords="offset points", ha="center", fontsize=7)
    axis.set_ylim(0, 1.5 * rows[~ratios].value.max())  # room for what is said above the bars
