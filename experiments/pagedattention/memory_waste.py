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
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvarena.allocators.usage import LEAVES, paper_rollup, paper_vllm_rollup, strict_rollup
from kvarena.experiments.kit import plots
from kvarena.experiments.kit.replay import Replayer, workload_of
from kvarena.experiments.kit.seeds import frames_of_seeds, seeded, seeds_of, unread_seeds
from kvarena.harness.record.progress import Progress
from kvarena.harness.record.record import Frames, Measured, Recorder
from kvarena.harness.record.statistics import median_interval
from kvarena.harness.record.summary import SummaryRow, frame, published_values, row
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
from kvarena.harness.run.published import is_earned, named
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System

NAME = "memory_waste"
HEADLINE = "share_of_kv_memory"
READS = {
    "modelled": ("model", "trace", "arrival", "decoding", "engine", "device", "systems"),
    "measured": ("model", "trace", "arrival", "decoding", "engine", "device", "systems", "threads"),
}
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


def unread(run: Run) -> dict[str, str]:
    """Keys that this run does not read, and what to write instead."""
    return unread_seeds(run)


def measure(run: Run, recorder: Recorder) -> Measured:
    """Serve one overloaded trace with every system and average its memory; again for every seed."""
    seeds = seeds_of(run)
    replayer, cells, notes = Replayer(run), list[Frames](), dict[str, object]()
    with Progress(NAME, len(seeds) * len(run.systems)) as progress:
        for seed in seeds:
            workload = workload_of(run, seed=seed)
            notes = notes or {"workload": workload.provenance, "rate_asked": workload.rate}
            for system in run.systems:
                progress.stage(f"seed {seed}, {system.name}")
                cell = recorder.cell(f"{seed}-{system.name}", partial(_cell, run, replayer, system, workload))
                cells.append({name: table.assign(seed=seed) for name, table in cell.items()})
                progress.advance()
    return Measured(frames_of_seeds(cells, seeds[0]), notes)


def _cell(run: Run, replayer: Replayer, system: System, workload: Workload) -> Frames:
    requests, steps, _ = replayer.serve(system, workload)
    means = averages(window(steps, run.params.window_s)).assign(system=system.name)
    memory = by_interval(steps, run.params.record_every_s)
    return {"averages": means, "memory_by_interval": memory, "requests": requests}


def summarize(run: Run, frames: Frames) -> pd.DataFrame:
    """The paper's row of every published bar, and ours of every system over the seeds."""
    return frame(_rows(run, frames["averages"]))


def _rows(run: Run, means: pd.DataFrame) -> Iterator[SummaryRow]:
    for system in run.systems:
        for average, by_seed in means[means.system == system.name].groupby("average", sort=False):
            values = pd.DataFrame([_quantities(system, mean) for _, mean in by_seed.iterrows()], index=by_seed.seed)
            for quantity, unit in _units(values).items():
                ours = named(run, system)
                yield row(median_interval(values[quantity].dropna()), quantity=quantity, unit=unit, **ours)
                published = named(seeded(run, 0), system, FIGURE)
                is_bar = average == Average.OVER_ITERATIONS and quantity.startswith(f"{HEADLINE}:")
                if is_bar and is_earned(published) and 0 in values.index:
                    yield row(float(values[quantity][0]), quantity=quantity, unit=unit, **published)


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
    theirs = published_values("pagedattention", figure=FIGURE)
    device = _what_ran(summary)
    figure, (left, right) = plots.canvas(1, 2, width=7.5, height=4.6)
    title = "PagedAttention Fig 2, with what its pieces are" if plots.stands_for(summary, FIGURE) else "K/V memory"
    _bars(left, summary, theirs)
    left.set(ylabel="% of the K/V pool", title=f"{title}\n{device}")
    _leaves(right, summary)
    figure.tight_layout()
    return figure


def _what_ran(summary: pd.DataFrame) -> str:
    """The setup and the clock; a sweep may have several setups, and its labels tell them apart."""
    setups = summary.setup.unique()
    return f"{setups[0] if len(setups) == 1 else f'{len(setups)} setups, as labelled'}; {summary.clock.iloc[0]}"


def _bars(axis: Axes, summary: pd.DataFrame, theirs: pd.DataFrame) -> None:
    """A bar for every system; beside one that stands for a published system, paler, the published bar."""
    rows = plots.preferring_earned(summary[summary.quantity.str.startswith(f"{HEADLINE}:")])
    kinds = rows.assign(kind=rows.quantity.str.split(":").str[1]).pivot(index="label", columns="kind", values="value")
    published = theirs.assign(kind=theirs.quantity.str.split(":").str[1])
    shown = plots.shown_names(rows)
    for x, (label, own) in enumerate(kinds.reindex(list(shown)).iterrows()):
        pair = published[(published.system == rows.system[rows.label == label].iloc[0])].set_index("kind")["value"]
        _bar(axis, x - 0.2 if len(pair) else x, own.dropna(), 1.0)
        if len(pair):
            _bar(axis, x + 0.2, pair, 0.45)
    handles = [axis.bar(0, 0, color=colour, label=kind.replace("_", " ")) for kind, colour in KINDS.items()]
    if len(rows) and (rows.paper != "kvarena").any():
        handles.append(axis.bar(0, 0, color="black", alpha=0.3, label="paler: published"))
    axis.legend(handles=handles, fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.34), ncols=3)
    axis.set_xticks(range(len(shown)), list(shown.values()), rotation=30, ha="right", fontsize=8)


def _bar(axis: Axes, x: float, kinds: pd.Series, alpha: float) -> None:
    bottom = 0.0
    for kind, colour in KINDS.items():
        if kind in kinds.index:
            value = float(kinds[kind])
            axis.bar(x, value, 0.36, bottom, color=colour, alpha=alpha, edgecolor="black", lw=0.4)
            if value > 6:
                axis.text(x, bottom + value / 2, f"{value:.1f}", ha="center", va="center", fontsize=6)
            bottom += value


def _leaves(axis: Axes, summary: pd.DataFrame) -> None:
    prefix = f"leaf_{HEADLINE}_{Average.WHILE_WAITING}:"
    rows = summary[summary.quantity.str.startswith(prefix)]
    when = "while requests wait"
    if rows.empty:
        when = "in all iterations: nobody waited"
        rows = summary[summary.quantity.str.startswith(f"leaf_{HEADLINE}:")]
    table = rows.assign(leaf=rows.quantity.str.split(":").str[1]).pivot(index="label", columns="leaf", values="value")
    table = table.loc[list(dict.fromkeys(rows.label))]
    table.index = pd.Index(list(plots.shown_names(rows).values()))
    shown = [leaf for leaf in LEAVES if table[leaf].max() > 0.005]
    plots.stacked_bars(axis, table, shown)
    axis.set(ylabel="% of the K/V pool", title=f"the same in nine leaves, {when}\n{_what_ran(summary)}")
    axis.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.34), ncols=4)
