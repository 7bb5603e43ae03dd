"""Fig 19: the price of a swap by its formula, real swaps that lose nothing, and two ways of serving one trace."""

from collections.abc import Callable
from itertools import pairwise

import pandas as pd
import pytest

from kvarena.allocators.policy import SwapIn
from kvarena.errors import UserError
from kvarena.experiments.command.compose import compose_run
from kvarena.experiments.kit.block_sweep import variants
from kvarena.experiments.pagedattention.preemption import AS_DRAWN, preempting, ways
from kvarena.experiments.pagedattention.preemption_cost import (
    RECOMPUTE,
    PreemptionBench,
    modelled_costs,
    scattered,
)
from kvarena.harness.model.build import build_model
from kvarena.harness.paths import PUBLISHED
from kvarena.harness.record.summary import beside_published, read_published
from kvarena.harness.run.published import is_earned, named

SHORT = ("arrival.duration_s=60", "arrival.rate=3", "params.replay_block_sizes=[8,16]")
TINY = (
    "clock=measured", "device=cpu", "model=tiny-opt", "systems=[paged]", "arrival.duration_s=0.05", "arrival.rate=300",
    "trace.max_tokens=96", "params.tokens=40", "params.block_sizes=[1,16]", "params.replay_block_sizes=[4]",
    "params.pool_bytes=131072", "params.swap_bytes=1MB", "params.victims=2", "params.rounds=2",
)  # fmt: skip


def test_a_swap_costs_its_bytes_and_its_copies() -> None:
    run = compose_run("experiment=preemption", "systems=[paged]")
    for size, system in variants(run.systems[0], [1, 16, 100]):
        costs = modelled_costs(run, system, 256)
        blocks = -(-256 // size)  # whole blocks are moved
        num_bytes, copies = blocks * size * 819_200, blocks * 80  # of 40 layers, K and V
        assert costs["swap out"] == pytest.approx(num_bytes / 13.0e9 + copies * 1.93e-6)
        assert costs["swap in"] == pytest.approx(num_bytes / 12.1e9 + copies * 3.4e-6)
        assert costs["swap in+out"] == costs["swap in"] + costs["swap out"]
        assert costs[RECOMPUTE] == pytest.approx(12.0e-3 + 256 * 0.13e-3)


def test_modelled_costs_are_near_the_published(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of("preemption", "systems=[paged]", *SHORT)
    assert set(summary[summary.quantity == "overhead_vs_block_size"].figure) == {"fig19a"}
    rows = beside_published(summary[summary.figure == "fig19a"], read_published(PUBLISHED)).dropna(subset="published")
    assert len(rows) == 4 * 9
    error = (rows.value / rows.published - 1).abs().groupby(rows.system).max()
    assert error[["swap in", "swap out", "swap in+out"]].max() < 0.07
    assert error[AS_DRAWN] < 0.13
    kinds = rows.groupby("system").evidence.unique().str[0]
    assert kinds[AS_DRAWN] == "predicted"
    assert kinds["swap out"] == "calibrated"
    own = summary[summary.quantity == "cost_of_recompute"].set_index("x").value
    drawn = summary[summary.system == AS_DRAWN].set_index("x").value
    assert (drawn / own).round(9).eq(0.9).all()
    assert set(summary[summary.quantity == "cost_of_swap in"].evidence) == {"calibrated"}
    other = summary_of("preemption", "systems=[paged]", "device=a100-80gb", "engine=lean", *SHORT)
    assert set(other[other.quantity == "overhead_vs_block_size"].evidence) == {"predicted"}, "fitted to nothing here"
    assert set(other.paper) == {"kvarena"}


def test_both_ways_serve_the_trace(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of("preemption", *SHORT, "systems=[paged,vattention-64kb]")
    rows = summary[summary.quantity == "normalized_latency_vs_block_size"]
    assert set(rows.paper) == {"kvarena"}, "another load is not Fig 19b"
    assert set(zip(rows.system, rows.x, rows.evidence, strict=True)) == {
        (f"paged-{way}/vllm2023", x, kind)
        for way in ("recompute", "swap") for x, kind in ((8, "conditional"), (16, "predicted"))
    }  # fmt: skip
    stall = summary[(summary.quantity == "stall_mean_s_vs_block_size") & (summary.x == 16)].set_index("system").value
    assert stall["paged-recompute/vllm2023"] == 0 < stall["paged-swap/vllm2023"], "only copies keep a step waiting"
    preempted = summary[summary.quantity == "preemptions_vs_block_size"].value
    assert (preempted > 0).all()
    assert list(summary[summary.quantity == "normalized_latency"].system) == ["vattention-64KB/vllm2023"]


def test_a_victims_blocks_lie_scattered() -> None:
    run = compose_run("experiment=preemption", "systems=[paged]", "model=tiny-opt", "engine=lean")
    policy = scattered(run, run.systems[0], [160, 160]).policy
    policy.check_integrity()
    tables = [policy.block_table(i) for i in range(2)]
    assert [len(table) for table in tables] == [10, 10]
    assert any(b - a != 1 for table in tables for a, b in pairwise(table))
    assert policy.swapping.can_swap_out([0])


def test_a_swap_that_loses_bytes_is_noticed_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    run = compose_run("experiment=preemption", *TINY)
    bench = PreemptionBench(run, run.systems[0], build_model(run.model, "cpu"), tokens=40, victims=2)
    try:
        bench.check()
        sample = bench.sample()
        assert sample["swap in+out"] == pytest.approx(sample["swap in"] + sample["swap out"])
        assert min(sample.values()) > 0
        apply = bench._store.apply
        monkeypatch.setattr(
            bench._store, "apply", lambda actions: apply([a for a in actions if not isinstance(a, SwapIn)][:1])
        )
        with pytest.raises(RuntimeError, match="other K/V than before"):
            bench.check()
    finally:
        bench.close()


def test_measured_it_swaps_and_recomputes_for_real(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of("preemption", *TINY)
    assert set(summary.evidence) == {"measured"}
    cost = summary[summary.quantity == "overhead_vs_block_size"]
    assert set(cost.panel) == {"tiny-opt, a request of 40 tokens, 1 x cpu"}
    assert set(cost.system) == {
        "paged-recompute/numba", "paged-swap-in/numba", "paged-swap-out/numba", "paged-swap-in+out/numba",
    }  # fmt: skip
    assert (cost.value > 0).all()
    replays = summary[summary.quantity == "normalized_latency_vs_block_size"]
    assert set(replays.system) == {"paged-recompute/numba", "paged-swap/numba"}
    preempted = summary[summary.quantity == "preemptions_vs_block_size"]
    assert (preempted.value > 0).all()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("params.tokens=0", "at least 1"),
        ("params.tokens=2048", "from 1 to 2047"),
        ("params.replay_block_sizes=[0]", "at least 1"),
        ("params.swap_bytes=lots", "not a size"),
        ("params.swap_bytes=0", "no CPU pool"),
        ("systems=[vattention-64kb]", "allocator paged"),
    ],
)
def test_what_cannot_be_is_refused(override: str, said: str, summary_of: Callable[..., pd.DataFrame]) -> None:
    overrides = (*SHORT, override) if override.startswith("systems") else ("systems=[paged]", *SHORT, override)
    with pytest.raises(UserError, match=said):
        summary_of("preemption", *overrides)


def earned(*overrides: str) -> set[str]:
    """Of the two figures, those whose rows swapping would carry."""
    run = compose_run("experiment=preemption", "systems=[paged]", *overrides)
    ways = {"fig19a": "swap in", "fig19b": "swap"}
    return {figure for figure, way in ways.items() if is_earned(named(run, run.systems[0], figure, key=way, x=16))}


def test_with_the_defaults_both_figures_are_earned() -> None:
    assert earned() == {"fig19a", "fig19b"}


@pytest.mark.parametrize(
    ("overrides", "left"),
    [
        ("params.tokens=512", {"fig19b"}),
        ("arrival.rate=3", {"fig19a"}),
        ("params.swap_bytes=10GB", {"fig19a"}),
        ("arrival.seed=1", {"fig19a"}),
        ("trace=alpaca", {"fig19a"}),
        ("device=a100-40gb device.copy_in_us=4", set()),
        ("device=h100 engine=lean", set()),
        ("model=llama-13b", set()),
    ],
)
def test_whatever_changes_a_figure_loses_its_name(overrides: str, left: set[str]) -> None:
    assert earned(*overrides.split()) == left


def test_a_scheduler_without_a_choice_is_served_as_it_is() -> None:
    run = compose_run("experiment=preemption", "systems=[orca-max,paged]", "scheduler=chunked_prefill", "engine=lean")
    for system in run.systems:
        assert ways(system) == ("recompute",)
        assert preempting(system, "recompute", "20GB") == system
