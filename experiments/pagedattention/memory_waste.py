"""Where the bytes of the K/V pool are while requests wait (PagedAttention Fig 2), by allocator.

Fig 2 has four kinds, drawn from the artifact's counters; its vLLM bar gives the three small pieces the names of the
Orca bars, which they are not. Here every bar has its true kinds, six stricter kinds, and the nine leaves below them.

The published bars are one replay each, with the artifact's seed. So are the rows that carry their names; those over all
seeds are ours.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import pandas as pd
from matplotlib.figure import Figure

from kvarena.allocators.usage import paper_rollup, paper_vllm_rollup, strict_rollup
from kvarena.experiments.kit.cells import Cell, run_cells
from kvarena.experiments.kit.panels import Panel, drawn, stacked
from kvarena.experiments.kit.reads import reads
from kvarena.experiments.kit.replay import Replayer, workload_of
from kvarena.experiments.kit.seeds import first_seed_alone, seed_rows, seeded, seeds_of, unread_seeds
from kvarena.experiments.kit.windows import window_of
from kvarena.harness.record.record import Frames, Measured, Recorder
from kvarena.harness.record.summary import SummaryRow
from kvarena.harness.record.time_averages import (
    Average,
    averages,
    by_interval,
    check_window,
    leaves,
    shares,
    usage_of,
    window,
)
from kvarena.harness.requests.workload import Workload
from kvarena.harness.run.published import named
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System

HEADLINE = "share_of_kv_memory"
READS = reads()
ON_DEMAND = ("paged", "vattention")  # promise nothing: the paper's vLLM bar has their kinds
FIGURE = "fig2"


@dataclass
class Params:
    """`params.*` of conf/experiment/memory_waste.yaml; null there means: by the profile."""

    window_s: list[float] | None = None  # [from, to]; null: the steps that leave someone waiting
    seeds: list[int] = field(default_factory=list)  # of trace and arrivals; at least 6 give a 95 % interval
    pool_bytes: int | None = None  # null: the pool the engine ran with, else what the device has left
    record_every_s: float = 10.0  # memory_by_interval.parquet sums the steps up by so many seconds

    def __post_init__(self) -> None:
        """Refuse what is no window, before anything is replayed."""
        check_window(self.window_s)


def unread(run: Run[Params]) -> dict[str, str]:
    """Keys that this run does not read, and what to write instead."""
    return unread_seeds(run)


def measure(run: Run[Params], recorder: Recorder) -> Measured:
    """Serve one overloaded trace with every system and average its memory; again for every seed."""
    seeds = seeds_of(run)
    replayer, workloads = Replayer(run), {seed: workload_of(run, seed=seed) for seed in seeds}
    cells = [
        Cell(f"{seed}-{system.name}", partial(_cell, run, replayer, system, workload), {"seed": seed})
        for seed, workload in workloads.items()
        for system in run.systems
    ]
    first = workloads[seeds[0]]
    notes = {"workload": first.provenance, "rate_asked": first.rate}
    return Measured(first_seed_alone(run_cells(run.experiment, recorder, cells), seeds[0]), notes)


def _cell(run: Run[Params], replayer: Replayer, system: System, workload: Workload) -> Frames:
    requests, steps, _ = replayer.serve(system, workload)
    means = averages(window(steps, window_of(run, workload, run.params.window_s))).assign(system=system.name)
    memory = by_interval(steps, run.params.record_every_s)
    return {"averages": means, "memory_by_interval": memory, "requests": requests}


def summarize(run: Run[Params], frames: Frames) -> Iterator[SummaryRow]:
    """The paper's row of every published bar, and ours of every system over the seeds."""
    means = frames["averages"]
    for system in run.systems:
        for average, by_seed in means[means.system == system.name].groupby("average", sort=False):
            values = pd.DataFrame([_quantities(system, mean) for _, mean in by_seed.iterrows()], index=by_seed.seed)
            for quantity, unit in _units(values).items():
                ours = published = named(run, system)
                if average == Average.OVER_ITERATIONS and quantity.startswith(f"{HEADLINE}:"):
                    published = named(seeded(run, 0), system, FIGURE)
                yield from seed_rows(values[quantity], ours, published, quantity=quantity, unit=unit)


def _units(values: pd.DataFrame) -> dict[str, str]:
    """Quantities that were taken at all, and their units: all are shares but for two."""
    taken = values.dropna(axis="columns", how="all")
    others = {"mean_batched_requests": "requests", "time_with_requests_waiting": "s"}
    return {name: next((u for start, u in others.items() if name.startswith(start)), "%") for name in taken.columns}


def _quantities(system: System, mean: pd.Series) -> dict[str, float]:
    """Every quantity of one system under one average."""
    if mean.num_steps == 0:
        return {}
    usage, average = usage_of(mean), mean.average
    drawn = average == Average.OVER_ITERATIONS
    on_demand = system.allocator.name in ON_DEMAND
    paper = shares(paper_vllm_rollup(usage) if on_demand else paper_rollup(usage))
    suffix = "" if drawn else f"_{average}"
    kinds = {
        f"{HEADLINE}{suffix}": paper,
        f"strict_{HEADLINE}{suffix}": shares(strict_rollup(usage)),
        f"leaf_{HEADLINE}{suffix}": shares(leaves(usage)),
    }
    if drawn and on_demand:
        kinds[f"{HEADLINE}_as_drawn"] = as_drawn(paper)
    values = {f"{name}:{kind}": share for name, each in kinds.items() for kind, share in each.items()}
    values[f"mean_batched_requests{suffix or '_over_iterations'}"] = float(mean.batch)
    if average == Average.WHILE_WAITING:
        values["time_with_requests_waiting"] = float(mean.seconds)
    return values


def as_drawn(kinds: dict[str, float]) -> dict[str, float]:
    """The vLLM bar as the artifact's script draws it: free memory halved under two names, last blocks as external."""
    return {
        "token_states": kinds["token_states"],
        "reservation": kinds["free_blocks"] / 2,
        "internal_fragmentation": kinds["free_blocks"] / 2,
        "external_fragmentation_and_others": kinds["last_block_waste"],
    }


KINDS = {
    "token_states": "#009E73",
    "reservation": "#56B4E9",
    "internal_fragmentation": "#D55E00",
    "external_fragmentation_and_others": "#BBBBBB",
    "last_block_waste": "#E69F00",
    "free_blocks": "#EEEEEE",
}


def draw(summary: pd.DataFrame) -> Figure:
    """The bars of Fig 2, each beside the published one where it stands for it; and the nine leaves of every system."""
    leaves_of, when = f"leaf_{HEADLINE}_{Average.WHILE_WAITING}:.*", "while requests wait"
    if not summary.quantity.str.fullmatch(leaves_of).any():
        leaves_of, when = f"leaf_{HEADLINE}:.*", "in all iterations: nobody waited"
    kinds = Panel(partial(stacked, colours=KINDS), f"{HEADLINE}:.*", "% of the K/V pool", what="K/V memory")
    leaves_too = Panel(stacked, leaves_of, "% of the K/V pool", what=f"the same in nine leaves, {when}")
    return drawn(summary, [kinds, leaves_too], width=7.5, height=4.6)
