"""How many requests run at once under each allocator (PagedAttention Fig 13), as a mean over iterations.

The figure's window is its artifact's: a trace of 900 s, iterations from 600 s on, the drain after the last arrival
included. A second run without a drain stands beside it, under its own name.

The published bars are one replay each, with the artifact's seed. So are the rows that carry their names; those over all
seeds are ours.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import pandas as pd

from kvarena.errors import UserError
from kvarena.experiments.kit.cells import Cell, run_cells
from kvarena.experiments.kit.latency_curve import unread_traces
from kvarena.experiments.kit.panels import Panel, bars, drawn
from kvarena.experiments.kit.reads import reads
from kvarena.experiments.kit.replay import Replayer, example_of, trace_named, workload_of
from kvarena.experiments.kit.seeds import first_seed_alone, seed_rows, seeded, seeds_of, unread_seeds
from kvarena.experiments.kit.windows import window_of
from kvarena.harness.record.record import Frames, Measured, Recorder
from kvarena.harness.record.statistics import median_interval
from kvarena.harness.record.summary import Names, SummaryRow, row
from kvarena.harness.record.time_averages import Average, averages, by_interval, check_window, window
from kvarena.harness.run.published import named
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System

HEADLINE = "mean_batched_requests"
READS = reads()
COMPARED = "with_drain"  # the window of the published figure


@dataclass
class Load:
    """One load and the window in which the batch is averaged."""

    figure: str  # whose panel it is
    window: str  # its name: with_drain is compared with the paper
    trace: str  # of conf/trace/
    rate: float  # requests/s; arrival.rate overrides it
    duration_s: float  # arrivals before this time
    window_s: list[float] | None = None  # [from, to]; null: the steps that leave someone waiting
    systems: list[str] | None = None  # of the experiment's; null: all

    def __post_init__(self) -> None:
        """Refuse what is no window, before anything is replayed."""
        check_window(self.window_s)

    @property
    def key(self) -> str:
        """Name of its cells."""
        return f"{self.figure}-{self.window}"

    @property
    def quantity(self) -> str:
        """Its mean over iterations."""
        return HEADLINE if self.window == COMPARED else f"{HEADLINE}:{self.window}"

    def run_of(self, run: "Run[Params]") -> "Run[Params]":
        """The run with this load's trace and arrivals."""
        trace = trace_named(run, self.trace, run.params.paths.get(self.trace))
        arrival = replace(run.arrival, rate=run.arrival.rate or self.rate, duration_s=self.duration_s)
        return replace(run, trace=replace(trace, max_tokens=run.trace.max_tokens), arrival=arrival)

    def systems_of(self, run: "Run[Params]") -> list[System]:
        """The systems that it is served with."""
        return [system for system in run.systems if self.systems is None or system.name in self.systems]

    def names(self, run: "Run[Params]", system: System, *, published: bool = False) -> Names:
        """Columns that name a row; `published`: of seed 0, those of the published bar where it stands for one."""
        own = self.run_of(run)
        detail = f"{own.arrival.rate:g} req/s"
        if published and self.window == COMPARED and self.figure in run.published:
            return named(seeded(own, 0), system, self.figure, detail=detail, window_s=self.window_s)
        return named(own, system, detail=detail)


@dataclass
class Params:
    """`params.*` of conf/experiment/batched_requests.yaml; null there means: by the profile."""

    loads: list[Load] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)  # of traces and arrivals; at least 6 give a 95 % interval
    paths: dict[str, str | None] = field(default_factory=dict)  # trace -> local file, beside trace.path
    pool_bytes: int | None = None  # null: the pool the engine ran with, else what the device has left
    record_every_s: float = 10.0  # memory_by_interval.parquet sums the steps up by so many seconds


def unread(run: Run[Params]) -> dict[str, str]:
    """Keys that this run does not read, and what to write instead."""
    traces = [load.trace for load in run.params.loads]
    rules = unread_seeds(run)
    rules |= {"arrival.duration_s": "each load of params.loads has its duration_s"}
    rules |= unread_traces(run, traces, "a load of params.loads", of_all=("max_tokens",))
    if run.params.paths.get(run.trace.name):
        rules["trace.path"] = f"params.paths.{run.trace.name} is given"
    for trace in set(run.params.paths) - set(traces):
        rules[f"params.paths.{trace}"] = "no load of this run has that trace"
    return rules


def measure(run: Run[Params], recorder: Recorder) -> Measured:
    """Serve every load with every system, under every seed. Raises UserError where there is no load, or one twice."""
    seeds = seeds_of(run)
    loads = _checked(run)
    replayer = Replayer(run)
    cells = [
        Cell(f"{load.key}-{system.name}-{seed}", partial(_cell, run, replayer, system, load, seed),
             {"load": load.key, "seed": seed})
        for load in loads for seed in seeds for system in load.systems_of(run)
    ]  # fmt: skip
    frames = run_cells(run.experiment, recorder, cells)
    notes = {}
    for load in loads:
        workload = example_of(load.run_of(run), seed=seeds[0])
        notes[load.key] = {**workload.provenance, "rate_asked": workload.rate, "window_s": load.window_s}
    return Measured(first_seed_alone(frames, seeds[0]), notes)


def _checked(run: Run[Params]) -> list[Load]:
    loads: list[Load] = run.params.loads
    keys = {load.key for load in loads}
    alike = {(load.trace, run.arrival.rate or load.rate, load.window) for load in loads}
    if not loads or min(len(keys), len(alike)) < len(loads):
        raise UserError(
            "params.loads: at least one load, and no figure, nor a trace at one rate, with one window twice"
        )
    if not any(load.systems_of(run) for load in loads):
        raise UserError("params.loads: none of the loads is for a system of this run (its key systems)")
    return loads


def _cell(run: Run[Params], replayer: Replayer, system: System, load: Load, seed: int) -> Frames:
    workload = workload_of(load.run_of(run), seed=seed)
    requests, steps, _ = replayer.serve(system, workload)
    means = averages(window(steps, window_of(run, workload, load.window_s, "params.loads"))).assign(
        system=system.name, peak=int(steps.requests.max()), preemptions=int(steps.preempted.sum())
    )
    memory = by_interval(steps, run.params.record_every_s)
    return {"averages": means, "memory_by_interval": memory, "requests": requests}


def summarize(run: Run[Params], frames: Frames) -> Iterator[SummaryRow]:
    """The paper's row of every published bar, and ours of every load and system over the seeds."""
    means = frames["averages"]
    for load in run.params.loads:
        for system in load.systems_of(run):
            yield from _rows(run, system, load, means[(means.load == load.key) & (means.system == system.name)])


def _rows(run: Run[Params], system: System, load: Load, means: pd.DataFrame) -> Iterator[SummaryRow]:
    """Nothing was fitted to Fig 13: the engine's constants come from Fig 12a, the pool from Fig 2."""
    ours, published = load.names(run, system), load.names(run, system, published=True)
    for average in Average:
        by_seed = means[means.average == average].set_index("seed")
        quantity, earned = load.quantity, published
        if average != Average.OVER_ITERATIONS:
            quantity, earned = f"{HEADLINE}_{average}:{load.window}", ours
        yield from seed_rows(by_seed.batch[by_seed.num_steps > 0], ours, earned, quantity=quantity, unit="requests")
    for count in ("peak", "preemptions"):
        samples = means.drop_duplicates("seed")[count]
        yield row(median_interval(samples), quantity=f"{count}:{load.window}", unit="requests", **ours)


WINDOWS = f"{HEADLINE}(:.*)?"  # the figure's, and those of other names
draw = partial(drawn, panels=[Panel(partial(bars, plain="the figure's window"), WINDOWS, "mean batched requests")],
               width=6.5)  # fmt: skip
