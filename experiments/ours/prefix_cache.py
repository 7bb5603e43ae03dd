"""What a prefix cache finds, by its size and by the allocator's unit, and what it saves (Mooncake's traces: FAST '25).

vLLM keeps blocks of 16 tokens, vAttention rows of whole page-groups. One of 2 MB holds so many tokens of one layer
that the end of what is shared is lost, but little has to be looked up. First requests come one after the other
(`prefix_hits.py`), so that nothing but the cache decides: counts. Then a stretch of the trace is served, with and
without the cache (`cached_service.py`).
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from kvarena.allocators.policy import Policy
from kvarena.errors import UserError
from kvarena.experiments.kit.cells import Cell, run_cells
from kvarena.experiments.kit.looks import looks
from kvarena.experiments.kit.panels import Panel, curves, drawn
from kvarena.experiments.kit.quantities import Quantity, rows
from kvarena.experiments.kit.reads import reads
from kvarena.experiments.kit.replay import tell_refusals
from kvarena.experiments.ours import cached_service
from kvarena.experiments.ours.cached_service import Params
from kvarena.experiments.ours.prefix_hits import count_blocks, count_hits, count_ids
from kvarena.harness.accounts.told import tell_once, told
from kvarena.harness.engine.serving import Serving
from kvarena.harness.record.record import Frames, Measured, Recorder
from kvarena.harness.record.summary import SummaryRow, row
from kvarena.harness.requests.block_ids import block_ids
from kvarena.harness.requests.chatbot_order import chatbot_order
from kvarena.harness.run.published import named
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System
from kvarena.harness.trace.load import load_trace
from kvarena.harness.trace.trace import Trace

HEADLINE = "hit_ratio_unlimited"
READS = reads("caching")
ROUNDING_TOKENS = 1 << 16  # beside all prompts, where there is no limit: for the last part of who is served
WAYS = {
    "every_id": "every id counts, a partly filled last block's too",
    "whole_blocks": "whole blocks of the trace, at most n - 1 of n tokens",
}


def unread(run: Run[Params]) -> dict[str, str]:
    """Keys that this run does not read, and what to write instead."""
    unused = {
        "allocator.prefix_cache": "the trace is served with the cache and without it",
        "allocator.max_rows": "there are as many rows as requests, so that memory alone limits what is kept",
        "model.tp": "params.serve_tp is how many devices share the model when it is served",
    }
    if cached_service.with_ids(run.trace).keep_hash_ids is not False:
        unused["trace.new_conversation"] = "the blocks' ids say what prompts share"
        unused["params.block_tokens"] = "it is for chats; trace.block_tokens says what an id of a file stands for"
    if run.clock == "measured":
        unused["params.context"] = "no position is stretched under clock=measured; trace.max_tokens bounds a sequence"
    return unused


def measure(run: Run[Params], recorder: Recorder) -> Measured:
    """Count the hits of every system's cache, without a limit and at every capacity; then serve."""
    _check(run.params)
    trace = _trace(run)
    run = replace(run, params=replace(run.params, context=run.limit or int(trace.total_tokens.max())))
    for system in run.systems:
        _policy(run, trace, system, None)  # refuses before it counts
    service = cached_service.Service(run)
    cells = [Cell(system.name, partial(_count, run, trace, system)) for system in run.systems]
    frames = run_cells(run.experiment, recorder, [*cells, Cell("served", service.cell)])
    frames["blocks"] = _blocks(run, trace)
    notes = {"trace": trace.provenance, "ways_of_counting": WAYS, "served": service.workload.provenance}
    return Measured(frames, notes)


def _check(params: Params) -> None:
    if params.repeats < 1:
        raise UserError(f"params.repeats={params.repeats}: must be 1 or more")
    if len(set(params.capacities_gb)) < len(params.capacities_gb):
        raise UserError(f"params.capacities_gb={params.capacities_gb}: none twice")
    if not all(capacity > 0 for capacity in params.capacities_gb):
        raise UserError(f"params.capacities_gb={params.capacities_gb}: every capacity must be above 0")


def _trace(run: Run[Params]) -> Trace:
    """Requests with the ids of their blocks: a file's, or a chat's own."""
    config = cached_service.with_ids(run.trace)
    trace = told(config, load_trace(config, run.limit))
    if run.arrival.process == "recorded" and trace.arrival_s is not None:
        trace = trace.take(np.argsort(trace.arrival_s, kind="stable"))
    elif config.new_conversation is not None and trace.conversation_ids is not None:
        trace = trace.take(chatbot_order(trace.conversation_ids, config.new_conversation, config.seed))
    block_tokens = trace.block_tokens or run.params.block_tokens
    if trace.hash_ids is None:
        tell_once(
            f"what could be found again is counted in whole blocks of {block_tokens} tokens of prompts "
            "(params.block_tokens), answers not among them; what is served finds those too, in each system's own blocks"
        )
    return replace(trace, hash_ids=block_ids(trace, block_tokens), block_tokens=block_tokens)


def _policy(run: Run[Params], trace: Trace, system: System, capacity_gb: float | None) -> Policy:
    """The system's allocator with its cache; without a limit, a pool in which all prompts have room side by side.

    Raises UserError for an allocator that keeps nothing.
    """
    cached = cached_service.with_cache(system, len(trace))
    all_prompts = 1.05 * (int(trace.prompt_tokens.sum()) + ROUNDING_TOKENS) * run.model.shard().kv_layout().token_bytes
    pool_bytes = round(all_prompts if capacity_gb is None else capacity_gb * 1e9)
    policy = Serving(run, cached, pool_bytes=pool_bytes, context=int(trace.prompt_tokens.max())).policy
    if policy.cache is None:
        raise UserError(f"systems: {system.name} keeps no prefixes of {run.model.name}, whose layers see a window")
    return policy


def _count(run: Run[Params], trace: Trace, system: System) -> Frames:
    assert trace.hash_ids is not None
    assert trace.block_tokens is not None
    rows = []
    for capacity_gb in [None, *run.params.capacities_gb]:
        policy = _policy(run, trace, system, capacity_gb)
        hits = count_hits(policy, trace.hash_ids, trace.prompt_tokens, trace.block_tokens)
        found = {"hit_tokens": hits.hit_tokens, "ratio": hits.ratio, "kept_gb": hits.cached_bytes / 1e9}
        unit = {"unit_tokens": hits.unit_tokens, "refused": hits.refused}
        if capacity_gb is not None:
            way, first = f", counted in {capacity_gb:g} GB", "its prompt is longer than the pool"
            tell_refusals(run, system, len(trace), hits.refused, first, way)
        rows.append({"system": system.name, "capacity_gb": capacity_gb, **unit, **found})
    return {"hits": pd.DataFrame(rows).astype({"capacity_gb": float})}


def _blocks(run: Run[Params], trace: Trace) -> pd.DataFrame:
    """Blocks of the trace itself, without a limit: what any cache of blocks of that size could find."""
    assert trace.hash_ids is not None
    assert trace.block_tokens is not None
    counts = {
        "blocks": sum(map(len, trace.hash_ids)),
        "hit_blocks:every_id": count_ids(trace.hash_ids),
        "hit_blocks:whole_blocks": count_blocks(trace.hash_ids, trace.prompt_tokens, trace.block_tokens),
    }
    return pd.DataFrame({"quantity": counts.keys(), "count": counts.values()})


def summarize(run: Run[Params], frames: Frames) -> Iterator[SummaryRow]:
    """Counts of the trace and of every cache, and what serving with one saves."""
    yield from _trace_rows(run, frames["blocks"])
    yield from _rows(run, frames["hits"])
    yield from cached_service.rows(run, frames["served"])


def _trace_rows(run: Run[Params], blocks: pd.DataFrame) -> Iterator[SummaryRow]:
    for quantity, count in zip(blocks.quantity, blocks["count"], strict=True):
        yield row(count, quantity=quantity, unit="blocks", **named(run, label="trace", counted=True))


UNLIMITED = (
    Quantity(HEADLINE, "%", lambda cell: 100 * cell.ratio, counted=True),
    Quantity("distinct_kv", "GB", "kept_gb", counted=True),
    Quantity("tokens_per_unit", "tokens", "unit_tokens", counted=True),
)
BY_CAPACITY = (Quantity("hit_ratio_vs_capacity", "%", lambda cell: 100 * cell.ratio, counted=True),)


def _rows(run: Run[Params], hits: pd.DataFrame) -> Iterator[SummaryRow]:
    for system in run.systems:
        own = hits[hits.system == system.name]
        yield from rows(UNLIMITED, own[own.capacity_gb.isna()], partial(named, run, system))
        for capacity in own.capacity_gb.dropna().tolist():
            yield from rows(BY_CAPACITY, own[own.capacity_gb == capacity], partial(named, run, system, x=capacity))


def _counts(axis: Axes, summary: pd.DataFrame) -> None:
    """The share of tokens found by capacity; a line where it ends without a limit."""
    found = summary[summary.quantity == "hit_ratio_vs_capacity"]
    unlimited = summary[summary.quantity == HEADLINE]
    tokens = summary[summary.quantity == "tokens_per_unit"].set_index("label").value
    curves(axis, found, {str(label): f": {value:.4g} tokens in a unit" for label, value in tokens.items()})
    if len(unlimited):
        top = float(unlimited.value.max())
        axis.set_ylim(0, 1.1 * top or 1)  # where nothing is found
        axis.axhline(top, color="#999999", ls=":", lw=1)
        axis.annotate(f"without a limit: {top:.1f} %", (0.02, top), xycoords=("axes fraction", "data"),
                      va="bottom", fontsize=8)  # fmt: skip
    capacities = sorted(found.x.unique())
    axis.set_xscale("log")
    axis.set_xticks(capacities, [f"{capacity:g}" for capacity in capacities])
    axis.minorticks_off()
    if len(found):
        axis.legend(fontsize=7, frameon=False, loc="lower right")
    if found.label.nunique() > 1:
        _differences(axis.inset_axes((0.12, 0.48, 0.32, 0.26)), found)


def _differences(axis: Axes, found: pd.DataFrame) -> None:
    """The same curves less the first of them: they lie too close to tell apart."""
    by_label = found.pivot_table(index="x", columns="label", values="value", sort=False).sort_index()
    for label, look in looks(found).items():
        difference = by_label[label] - by_label.iloc[:, 0]
        axis.plot(by_label.index, difference, look.dash, color=look.colour, marker=look.marker, ms=3, lw=1)
    axis.set(xscale="log", xticks=[])
    axis.minorticks_off()
    axis.set_title(f"difference to {by_label.columns[0]}, points", fontsize=7)
    axis.tick_params(labelsize=6)


PANELS = (
    Panel(_counts, f"hit_ratio_vs_capacity|{HEADLINE}|tokens_per_unit", "prompt tokens found, %", "K/V pool, GB",
          what="counted: no clock is read"),
    Panel(cached_service.draw, "(ttft_mean|ttft_p99|prefill_tokens):.*", "time to first token, s"),
)  # fmt: skip
draw = partial(drawn, panels=PANELS, width=6.2, height=4.2)
