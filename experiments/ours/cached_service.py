"""Serving the first requests of a trace with and without a prefix cache: time to first token, and tokens prefilled."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

import pandas as pd
from matplotlib.axes import Axes

from kvarena.allocators.options import option, with_options
from kvarena.errors import UserError
from kvarena.experiments.kit import plots
from kvarena.experiments.kit.panels import title
from kvarena.experiments.kit.replay import Replayer, workload_of
from kvarena.harness.record.metrics import reused_share, summarize
from kvarena.harness.record.record import Frames
from kvarena.harness.record.statistics import median_interval
from kvarena.harness.record.summary import SummaryRow, row
from kvarena.harness.requests.block_ids import MOONCAKE_BLOCK
from kvarena.harness.requests.workload import Workload
from kvarena.harness.run.published import named
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System
from kvarena.harness.trace.config import TraceConfig
from kvarena.harness.trace.file_trace import states_ids


@dataclass
class Params:
    """`params.*` of conf/experiment/prefix_cache.yaml; null there means: by the profile."""

    takes_whole_files: ClassVar[bool] = True
    capacities_gb: list[float] = field(default_factory=list)  # of the pool, in counts
    block_tokens: int = MOONCAKE_BLOCK  # of a block whose ids are counted, of a chat: it states no ids of its own
    context: int | None = (
        None  # longest prompt + output; null: a file's longest where time is modelled, else the model's
    )
    serve_requests: int | None = None  # the first of the trace, to be served; null: all
    serve_tp: int = 1  # devices that share the model then
    repeats: int = 1  # times that it is served, with and without the cache in turn
    pool_bytes: int | None = None  # of K/V on one device then; null: what weights and activations leave


WAYS = {False: "without_cache", True: "with_cache"}
_LABELS = {False: "without the cache", True: "with it"}
QUANTITIES = {  # metric -> quantity, unit, factor
    "ttft_mean_s": ("ttft_mean", "s", 1.0),
    "ttft_p99_s": ("ttft_p99", "s", 1.0),
    "prefill_tokens": ("prefill_tokens", "tokens", 1.0),
    "reused_share": ("reused_share", "%", 100.0),
    "stall_mean_s": ("stall_mean", "s", 1.0),
    "rate_reached_per_s": ("rate_reached", "req/s", 1.0),
    "preemptions": ("preemptions", "count", 1.0),
}


def with_ids(trace: TraceConfig) -> TraceConfig:
    """The trace with the ids of its blocks, where it has them: then it has no conversations to be put in order."""
    if trace.path is None:
        return trace
    kept = replace(trace, keep_hash_ids=trace.keep_hash_ids or None, new_conversation=None)
    return kept if states_ids(kept) else trace


def with_cache(system: System, requests: int, on: bool = True) -> System:
    """The system with its prefix cache on or off. Raises UserError for an allocator that has none.

    Rows of virtual tensors are addresses only: there are as many as requests, so that memory alone limits what is kept.
    """
    allocator = system.allocator
    if option(allocator, "prefix_cache") is None:
        raise UserError(f"systems: {system.name} keeps no prefixes; allocators paged and vattention do")
    rows = max(option(allocator, "max_rows", 0), requests + 1)
    return replace(system, allocator=with_options(allocator, max_rows=rows, prefix_cache=on))


def _served(run: Run[Params]) -> Run[Params]:
    """The run on as many devices as share the model."""
    return replace(run, model=replace(run.model, tp=run.params.serve_tp))


class Service:
    """A trace's first requests, on as many devices as `params.serve_tp` says."""

    def __init__(self, run: Run[Params]) -> None:
        trace = replace(with_ids(run.trace), num_requests=run.params.serve_requests or run.trace.num_requests)
        self.run = replace(_served(run), trace=trace)
        self._replayer = Replayer(self.run)

    @cached_property
    def workload(self) -> Workload:
        """What is served: arrivals as the run says."""
        return workload_of(self.run)

    def cell(self) -> Frames:
        """A row for each time, system and way: all of them in turn."""
        rows = []
        for repeat in range(self.run.params.repeats):
            for system in self.run.systems:
                for on, way in WAYS.items():
                    metrics = self._metrics(with_cache(system, len(self.workload), on))
                    rows.append({"system": system.name, "way": way, "repeat": repeat, **metrics})
        return {"served": pd.DataFrame(rows)}

    def _metrics(self, system: System) -> dict[str, float]:
        served = self._replayer.serve(system, self.workload)
        fed = {"prefill_tokens": float(served.steps.prefill_tokens.sum()), "reused_share": reused_share(served.steps)}
        return summarize(served.requests, served.steps, served.resumed_gaps_ps) | fed


def rows(run: Run[Params], served: pd.DataFrame) -> Iterator[SummaryRow]:
    """Medians over the repeats, at the rate that was asked for; the ratio of TTFT is of what was served in turn."""
    for system in run.systems:
        of_system = served[served.system == system.name]
        shared = named(_served(run), system, x=of_system.rate_asked_per_s.iloc[0])
        ttft = of_system.pivot(index="repeat", columns="way", values="ttft_mean_s")
        yield row(median_interval(ttft[WAYS[True]] / ttft[WAYS[False]]), quantity="ttft_mean:with_over_without",
                  unit="ratio", **shared)  # fmt: skip
        for way in WAYS.values():
            table = of_system[of_system.way == way]
            for metric, (quantity, unit, factor) in QUANTITIES.items():
                yield row(median_interval(factor * table[metric]), quantity=f"{quantity}:{way}", unit=unit, **shared)


def draw(axis: Axes, summary: pd.DataFrame) -> None:
    """Mean and P99 of TTFT for each system, hollow without the cache; above, the tokens that were prefilled."""
    value = summary.set_index(["quantity", "label"]).value
    served = summary[summary.quantity == f"ttft_mean:{WAYS[True]}"]
    for place, (name, allocator) in enumerate(zip(served.label, served.allocator, strict=True)):
        colour = plots.colour_of(allocator)
        for x, on in ((place - 0.18, False), (place + 0.18, True)):
            mean, p99 = value[f"ttft_mean:{WAYS[on]}", name], value[f"ttft_p99:{WAYS[on]}", name]
            axis.plot([x, x], [mean, p99], color=colour, lw=1.2, zorder=1)
            axis.plot(x, mean, "o", ms=9, color=colour, mfc=colour if on else "white", label=f"mean, {_LABELS[on]}")
            axis.plot(x, p99, "_", ms=12, color=colour, label="P99")
            axis.annotate(_short(value[f"prefill_tokens:{WAYS[on]}", name]), (x, p99), (0, 4),
                          textcoords="offset points", ha="center", fontsize=7)  # fmt: skip
    axis.set_yscale("log")
    axis.set_xlim(-0.6, len(served) - 0.4)
    axis.set_xticks(range(len(served)), [name.replace("/", "\n") for name in served.label], fontsize=8)
    axis.margins(y=0.12)
    axis.set_ylim(axis.get_ylim()[0] / 1.5, None)  # room for the legend
    first_of_each = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    axis.legend(first_of_each.values(), first_of_each.keys(), fontsize=7, frameon=False, ncols=3, loc="lower center")
    title(axis, summary, f"served at {served.x.iloc[0]:.3g} req/s; above: tokens prefilled")


def _short(tokens: float) -> str:
    return f"{tokens / 1e6:.3g} M" if tokens >= 1e6 else f"{tokens / 1e3:.3g} k"
