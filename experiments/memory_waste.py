"""Where the bytes of the K/V pool are while requests wait (PagedAttention Fig 2), by allocator.

Fig 2 has four kinds, drawn from the artifact's counters; its vLLM bar gives the three small pieces the names of the
Orca bars, which they are not. Here every bar has its true kinds, six stricter kinds, and the nine leaves below them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvarena.allocators.usage import LEAVES, paper_rollup, paper_vllm_rollup, strict_rollup
from kvarena.experiments import plots
from kvarena.experiments.averages import Average, averages, by_interval, leaves, shares, usage_of, window
from kvarena.experiments.replay import Replayer, columns, panel_of, workload_of
from kvarena.harness.progress import Progress
from kvarena.harness.record import Frames, Outcome, Recorder
from kvarena.harness.run import Run
from kvarena.harness.summary import SummaryRow, frame, published_values, row
from kvarena.harness.systems import System
from kvarena.harness.workload import Workload

NAME = "memory_waste"
HEADLINE = "share_of_kv_memory"

# What the artifact ran for Fig 2 (its experiments/fig2.sh): another load is another figure and wears another panel.
FIG2 = {"rate": 4.0, "duration_s": 900.0}
FIG2_WINDOW_S = [300.0, 900.0]
FITTED = (
    "Fig 2 gave the pool: 984 blocks, since Orca(Max) leaves 88 of them unused. Step times are those of the engine, "
    "fitted to Fig 12; shares of a full pool hardly depend on them."
)
ON_DEMAND = ("paged", "vattention")  # promise nothing: the paper's vLLM bar has their kinds


@dataclass
class Params:
    """`params.*` of conf/experiment/memory_waste.yaml; null there means: by the profile."""

    window_s: list[float] | None = None  # [from, to]; null: the steps that leave someone waiting
    pool_bytes: int | None = None  # null: the pool the engine ran with, else what the device has left
    record_every_s: float = 10.0  # steps.parquet sums them up by so many seconds


def run(run: Run, recorder: Recorder) -> Outcome:
    """Serve one overloaded trace with every system and average its memory."""
    workload, replayer = workload_of(run), Replayer(run)
    cells: list[Frames] = []
    with Progress(NAME, len(run.systems)) as progress:
        for system in run.systems:
            progress.stage(system.name)
            cells.append(recorder.cell(system.name, partial(_cell, run, replayer, system, workload)))
            progress.advance()
    means, steps, requests = (
        pd.concat([cell[name] for cell in cells], ignore_index=True) for name in ("averages", "steps", "requests")
    )
    summary = frame(_summary(run, means))
    notes = {"workload": workload.provenance, "rate_asked": workload.rate, "fitted": FITTED}
    return Outcome(summary, requests, steps, HEADLINE, draw(summary), notes)


def _cell(run: Run, replayer: Replayer, system: System, workload: Workload) -> Frames:
    requests, steps, _ = replayer.serve(system, workload)
    means = averages(window(steps, run.params.window_s)).assign(system=system.name)
    return {"averages": means, "steps": by_interval(steps, run.params.record_every_s), "requests": requests}


def _summary(run: Run, means: pd.DataFrame) -> Iterator[SummaryRow]:
    like_fig2 = all(getattr(run.arrival, key) == value for key, value in FIG2.items())
    panel = panel_of(run, run.trace.name)
    if not (like_fig2 and run.params.window_s == FIG2_WINDOW_S):
        panel += f" {run.arrival}"
    for system in run.systems:
        for _, mean in means[means.system == system.name].iterrows():
            for paper, figure, quantity, value, unit in _quantities(system, mean):
                yield row(
                    value, experiment=NAME, paper=paper, figure=figure, panel=panel, quantity=quantity, unit=unit,
                    evidence=_evidence(run, system), **columns(run, system),
                )  # fmt: skip


def _evidence(run: Run, system: System) -> str:
    if run.clock == "measured":
        return "measured"
    return "calibrated" if run.imitates and system.published else "predicted"


Quantity = tuple[str, str, str, float, str]


def _quantities(system: System, mean: pd.Series) -> Iterator[Quantity]:
    """(paper, figure, quantity, value, unit) of one system under one average."""
    if mean.num_steps == 0:
        return
    usage, average = usage_of(mean), mean.average
    drawn = average == Average.OVER_ITERATIONS
    paper = paper_vllm_rollup(usage) if system.allocator.name in ON_DEMAND else paper_rollup(usage)
    suffix = "" if drawn else f"_{average}"
    for kind, share in shares(paper).items():
        if drawn:
            yield "pagedattention", "fig2", f"share_of_kv_memory:{kind}", share, "%"
        else:
            yield "kvarena", NAME, f"share_of_kv_memory{suffix}:{kind}", share, "%"
    for kind, share in shares(strict_rollup(usage)).items():
        yield "kvarena", NAME, f"strict_share_of_kv_memory{suffix}:{kind}", share, "%"
    for leaf, share in shares(leaves(usage)).items():
        yield "kvarena", NAME, f"leaf_share_of_kv_memory{suffix}:{leaf}", share, "%"
    if drawn and system.allocator.name in ON_DEMAND:
        for kind, share in as_drawn(shares(paper)).items():
            yield "kvarena", NAME, f"share_of_kv_memory_as_drawn:{kind}", share, "%"
    yield "kvarena", NAME, f"mean_batched_requests{suffix or '_over_iterations'}", float(mean.batch), "requests"
    if average == Average.WHILE_WAITING:
        yield "kvarena", NAME, "time_with_requests_waiting", float(mean.seconds), "s"


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
    """Fig 2, ours beside the published bars, and the nine leaves of every system."""
    ours = summary[(summary.figure == "fig2") & (summary.paper == "pagedattention")]
    theirs = published_values("pagedattention", figure="fig2")
    device = f"{summary.panel.iloc[0]}; {summary.clock.iloc[0]}, {summary.device.iloc[0]}"
    figure, (left, right) = plots.canvas(1, 2, width=7.5, height=4.6)
    _fig2(left, ours, theirs)
    left.set(ylabel="% of the K/V pool", title=f"PagedAttention Fig 2, with what its pieces are\n{device}")
    _leaves(right, summary)
    right.set(ylabel="% of the K/V pool", title=f"the same in nine leaves, while requests wait\n{device}")
    figure.tight_layout()
    return figure


def _fig2(axis: Axes, ours: pd.DataFrame, theirs: pd.DataFrame) -> None:
    """Bars in pairs where the paper has the system: ours, and paler the published one."""
    kinds = ours.assign(kind=ours.quantity.str.split(":").str[1]).pivot(index="system", columns="kind", values="value")
    published = theirs.assign(kind=theirs.quantity.str.split(":").str[1])
    names = list(dict.fromkeys(ours.system))
    for x, name in enumerate(names):
        pair = published[published.system == name].set_index("kind")["value"]
        offset = -0.2 if len(pair) else 0.0
        _bar(axis, x + offset, kinds.loc[name].dropna(), 1.0)
        if len(pair):
            _bar(axis, x + 0.2, pair, 0.45)
    handles = [axis.bar(0, 0, color=colour, label=kind.replace("_", " ")) for kind, colour in KINDS.items()]
    handles.append(axis.bar(0, 0, color="black", alpha=0.3, label="paler: published"))
    axis.legend(handles=handles, fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.34), ncols=3)
    axis.set_xticks(range(len(names)), [name.split("/")[0] for name in names], rotation=30, ha="right", fontsize=8)


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
    prefix = f"leaf_share_of_kv_memory_{Average.WHILE_WAITING}:"
    rows = summary[summary.quantity.str.startswith(prefix)]
    if rows.empty:  # nobody ever waited
        rows = summary[summary.quantity.str.startswith("leaf_share_of_kv_memory:")]
    table = rows.assign(leaf=rows.quantity.str.split(":").str[1]).pivot(index="system", columns="leaf", values="value")
    table = table.loc[list(dict.fromkeys(rows.system))]
    table.index = table.index.str.split("/").str[0]
    shown = [leaf for leaf in LEAVES if table[leaf].max() > 0.005]
    plots.stacked_bars(axis, table, shown)
    axis.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.34), ncols=4)
