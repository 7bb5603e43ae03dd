"""One workload served with blocks of several sizes: what `block_size` and `preemption` have in common.

A smaller block wastes less of a sequence's last one; a larger one needs fewer table look-ups, copies and driver calls.
A replay sees the memory, the batch and the copies. What the block size does to the attention kernel it sees under the
measured clock alone, where the kernel runs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes

from kvarena.allocators.options import unit_option
from kvarena.allocators.usage import Usage, paper_vllm_rollup
from kvarena.errors import UserError
from kvarena.experiments.kit.panels import Panel, curves, title
from kvarena.experiments.kit.quantities import Quantity, columns
from kvarena.experiments.kit.replay import Replayer, Served
from kvarena.harness.record.metrics import summarize
from kvarena.harness.record.summary import Evidence
from kvarena.harness.requests.workload import Workload
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System

LATENCY = "normalized_latency"
CLAIMED_FROM = 16  # tokens: below, what smaller blocks cost is mostly the attention kernel's time
BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # x of PagedAttention's Figs 18b and 19

# Our own quantities at every block size, and their units; docs/metrics.md has the formulas.
OURS = {
    "mean_batched_requests": "requests", "last_block_waste": "%", "preemptions": "count", "ttft_p50_s": "s",
    "tpot_p50_s": "s", "e2el_mean_s": "s", "stall_mean_s": "s", "rate_reached_per_s": "req/s",
}  # fmt: skip


class Line(NamedTuple):
    """A system with everything set, and what its rows are told apart by."""

    replayer: Replayer
    system: System
    columns: Mapping[str, object]


def check_block_sizes(sizes: Sequence[int]) -> None:
    """Raises UserError for none, for one twice, and for sizes that no block has."""
    if not sizes or len(set(sizes)) < len(sizes) or not all(1 <= size <= 256 for size in sizes):
        raise UserError(f"params.block_sizes={list(sizes)}: name at least one, each from 1 to 256, and none twice")


def has_blocks(system: System) -> bool:
    """Whether a block size means anything to the system."""
    return unit_option(system.allocator) == "block_size"


def variants(system: System, block_sizes: Sequence[int]) -> Iterator[tuple[int | None, System]]:
    """The system with every block size; once, as it is, where it has no blocks."""
    if not has_blocks(system):
        yield None, system
        return
    for size in block_sizes:
        yield size, replace(system, allocator=replace(system.allocator, block_size=size))


def serve_in_turn(run: Run[object], rounds: int, lines: Sequence[Line], workload: Workload) -> pd.DataFrame:
    """One row per round and line, of `measures`. The measured clock takes `rounds`, each line once in each."""
    rounds = rounds if run.clock == "measured" else 1
    rows = [
        {"round": number, **line.columns, **measures(line.replayer.serve(line.system, workload))}
        for number in range(rounds)
        for line in lines
    ]
    return pd.DataFrame(rows).astype({"block_size": float})


def measures(served: Served) -> dict[str, float]:
    """Every metric of one replay, its mean batch over iterations, and the share of held memory that is empty."""
    steps = served.steps
    batch = float((steps.requests * steps.steps).sum() / steps.steps.sum())
    kinds = paper_vllm_rollup(Usage(*steps[list(Usage._fields)].sum().tolist()))
    held = kinds["token_states"] + kinds["last_block_waste"]
    ours = {"mean_batched_requests": batch, "last_block_waste": 100 * kinds["last_block_waste"] / held}
    return summarize(served.requests, steps, served.resumed_gaps_ps) | ours


def quantities(size: int | None, figure: str) -> list[Quantity]:
    """Of a system with blocks of one size; of one without blocks, which has one point and no x."""
    suffix, known = ("_vs_block_size", figure) if size else ("", None)
    return [Quantity(f"{LATENCY}{suffix}", "s/token", "normalized_latency_s", known), *columns(OURS, suffix)]


def assumed(block_size: int | None) -> str:
    """What a modelled replay with such blocks rests on, if anything."""
    small = block_size is not None and block_size < CLAIMED_FROM
    return "attention reads blocks of any size equally fast" if small else ""


def latency_panel(axis: Axes, rows: pd.DataFrame) -> None:
    """Points that are not claimed are hollow: they leave out what small blocks cost the kernel."""
    curves(axis, rows)
    unclaimed = rows[rows.evidence == Evidence.CONDITIONAL]
    axis.plot(unclaimed.x, unclaimed.value, "o", mfc="white", mec="black", ms=5, ls="none", zorder=3)
    title(axis, rows, "", "hollow: the kernel's cost left out" if len(unclaimed) else "")


BY_SIZE = Panel(latency_panel, f"{LATENCY}(_vs_block_size)?", "normalized latency, s/token", "block size, tokens",
                doubling=True)  # fmt: skip
