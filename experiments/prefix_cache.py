"""What a prefix cache finds in a trace, by its size and by the allocator's unit (Mooncake's traces: FAST '25).

vLLM keeps blocks of 16 tokens; with vAttention a cache would keep page-groups, and a page-group of 2 MB holds so many
tokens of one layer that the end of what is shared is lost, but little has to be looked up. Requests are served one
after the other (harness/prefix_hits.py), so that nothing but the cache decides: all numbers are counts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvarena.allocators.page_groups import checked_page_group, row_geometries
from kvarena.errors import UserError
from kvarena.experiments import plots
from kvarena.experiments.replay import columns
from kvarena.harness.prefix_hits import Hits, Unit, count_hits, count_ids
from kvarena.harness.progress import Progress
from kvarena.harness.record import Frames, Outcome, Recorder
from kvarena.harness.run import Run
from kvarena.harness.summary import SummaryRow, frame, row
from kvarena.harness.systems import System
from kvarena.harness.trace.block_ids import MOONCAKE_BLOCK, block_ids
from kvarena.harness.trace.load import load_trace
from kvarena.harness.trace.trace import Trace

NAME = "prefix_cache"
HEADLINE = "hit_ratio_unlimited"
WAYS = {
    "every_id": "every id counts, a partly filled last block's too",
    "whole_blocks": "whole blocks of the trace, at most n - 1 of n tokens",
}


@dataclass
class Params:
    """`params.*` of conf/experiment/prefix_cache.yaml."""

    capacities_gb: list[float] = field(default_factory=list)  # of the cache
    block_tokens: int = MOONCAKE_BLOCK  # of the trace's ids; of a chat's, which has none of its own
    context: int | None = None  # longest prompt + output; null: the model's


def run(run: Run, recorder: Recorder) -> Outcome:
    """Count the hits of every system's unit, without a limit and at every capacity."""
    trace = _trace(run)
    cells = []
    with Progress(NAME, len(run.systems)) as progress:
        for system in run.systems:
            progress.stage(system.name)
            cells.append(recorder.cell(system.name, partial(_cell, run, trace, system))["hits"])
            progress.advance()
    table = pd.concat(cells, ignore_index=True)
    rows = [*_trace_rows(run, trace), *_rows(run, trace, table)]
    summary = frame(rows)
    notes = {"trace": trace.provenance, "ways_of_counting": WAYS}
    return Outcome(summary, pd.DataFrame(), table, HEADLINE, draw(summary), notes)


def _trace(run: Run) -> Trace:
    """Requests with the ids of their blocks: a file's, or a chat's own."""
    config = replace(run.trace, keep_hash_ids=run.trace.path is not None and run.trace.format == "mooncake")
    context = None if config.path is not None else run.params.context or run.model.max_tokens
    trace = load_trace(config, context)
    return replace(trace, hash_ids=block_ids(trace, run.params.block_tokens))


def unit_of(run: Run, system: System) -> Unit:
    """What the system's memory is kept in. Raises UserError for an allocator that shares nothing."""
    layout = run.model.shard().kv_layout()
    allocator = system.allocator
    if allocator.name == "paged":
        return Unit(allocator.block_size * layout.token_bytes, layout.token_bytes)
    if allocator.name == "vattention":
        page_group = checked_page_group(allocator.page_group)
        [geometry] = row_geometries(layout, page_group, allocator.tensor_slicing)
        return Unit(page_group, geometry.token_stride, geometry.num_tensors)
    raise UserError(f"systems: {system.name} keeps no prefixes; allocators paged and vattention do")


def _cell(run: Run, trace: Trace, system: System) -> Frames:
    unit = unit_of(run, system)
    rows = []
    for capacity_gb in [None, *run.params.capacities_gb]:
        hits = _hits(run, trace, unit, capacity_gb)
        kept = {"hit_tokens": hits.hit_tokens, "ratio": hits.ratio, "kept_gb": hits.units * unit.bytes / 1e9}
        rows.append({"system": system.name, "capacity_gb": capacity_gb, "unit_tokens": unit.tokens_each, **kept})
    return {"hits": pd.DataFrame(rows).astype({"capacity_gb": float})}


def _hits(run: Run, trace: Trace, unit: Unit, capacity_gb: float | None) -> Hits:
    assert trace.hash_ids is not None
    capacity = None if capacity_gb is None else round(capacity_gb * 1e9)
    return count_hits(trace.hash_ids, trace.prompt_tokens, run.params.block_tokens, unit, capacity)


def _trace_rows(run: Run, trace: Trace) -> Iterator[SummaryRow]:
    """Blocks of the trace itself, without a limit: what any cache of blocks of that size could find."""
    assert trace.hash_ids is not None
    layout = run.model.shard().kv_layout()
    block = run.params.block_tokens
    whole = _hits(run, trace, Unit(block * layout.token_bytes, layout.token_bytes), None).hit_tokens // block
    shared = {
        "experiment": NAME, "paper": "kvarena", "figure": NAME, "panel": trace.name, "system": "trace",
        "allocator": "none", "kernel": "none", "model": run.model.name, "clock": run.clock, "device": run.device_name,
        "unit": "blocks", "evidence": "exact",
    }  # fmt: skip
    yield row(sum(map(len, trace.hash_ids)), quantity="blocks", **shared)
    yield row(count_ids(trace.hash_ids), quantity="hit_blocks:every_id", **shared)
    yield row(whole, quantity="hit_blocks:whole_blocks", **shared)


def _rows(run: Run, trace: Trace, table: pd.DataFrame) -> Iterator[SummaryRow]:
    systems = {system.name: system for system in run.systems}
    for _, cell in table.iterrows():
        shared = {
            "experiment": NAME, "paper": "kvarena", "figure": NAME, "panel": trace.name, "evidence": "exact",
            **columns(run, systems[cell.system]),
        }  # fmt: skip
        if pd.isna(cell.capacity_gb):
            yield row(100 * cell.ratio, quantity=HEADLINE, unit="%", **shared)
            yield row(cell.kept_gb, quantity="distinct_kv", unit="GB", **shared)
            yield row(cell.unit_tokens, quantity="tokens_per_unit", unit="tokens", **shared)
        else:
            yield row(100 * cell.ratio, quantity="hit_ratio_vs_capacity", x=cell.capacity_gb, unit="%", **shared)


def draw(summary: pd.DataFrame) -> Figure:
    """Hit ratio by capacity, and, as dashed levels, without a limit."""
    figure, [axis] = plots.canvas(1, 1, width=6.4, height=4.2)
    rows = summary[summary.quantity == "hit_ratio_vs_capacity"]
    unlimited = summary[summary.quantity == HEADLINE]
    tokens = summary[summary.quantity == "tokens_per_unit"].set_index("system").value
    for i, (name, line) in enumerate(rows.groupby("system", sort=False)):
        _line(axis, line, f"{name}: {tokens[name]:.4g} tokens in a unit", i)
    if len(unlimited):
        top = float(unlimited.value.max())
        axis.axhline(top, color="#999999", ls=":", lw=1)
        axis.annotate(f"without a limit: {top:.1f} %", (0.02, top), xycoords=("axes fraction", "data"),
                      va="bottom", fontsize=8)  # fmt: skip
    axis.set(xscale="log", xlabel="capacity of the cache, GB", ylabel="prompt tokens found, %", ylim=(0, None))
    if len(summary):
        axis.set_title(f"{summary.panel.iloc[0]}, {summary.model.iloc[0]}: counted, no clock is read", fontsize=9)
    axis.legend(fontsize=7, frameon=False, loc="lower right")
    figure.tight_layout()
    return figure


def _line(axis: Axes, line: pd.DataFrame, label: str, number: int) -> None:
    line = line.sort_values("x")
    colour = plots.COLOURS.get(line.allocator.iloc[0], "#000000")
    dash = plots.DASHES[number % len(plots.DASHES)]
    axis.plot(line.x, line.value, dash, color=colour, marker=plots.MARKERS[number], ms=4, mfc="none", label=label)
