"""Fig 18b: what larger blocks cost, what is claimed of smaller ones, and what a kernel's cost changes."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from kvarena.errors import UserError
from kvarena.experiments.command.compose import compose_run
from kvarena.experiments.kit.block_sweep import measures
from kvarena.experiments.kit.replay import Replayer, trace_named, workload_of
from kvarena.experiments.pagedattention import block_size
from kvarena.harness.run.published import is_earned, named

DEFAULTS = ("experiment=block_size",)
SHORT = ("arrival.duration_s=40", "params.rates={sharegpt: 2.5}", "params.block_sizes=[4,16,256]")
PAGED = "systems=[paged]"
TINY = (
    "clock=measured", "device=cpu", "model=tiny-opt", "arrival.duration_s=0.05", "trace.max_tokens=64",
    "params.rates={sharegpt: 200}", "params.block_sizes=[1,16]", "params.pool_bytes=262144", "params.rounds=2",
)  # fmt: skip


def latency(summary: pd.DataFrame) -> pd.Series:
    rows = summary[summary.quantity == "normalized_latency_vs_block_size"]
    return rows.set_index("x").value


def test_rows_are_told_apart_by_block_size(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of("block_size", *SHORT)
    rows = summary[summary.quantity == "normalized_latency_vs_block_size"]
    assert set(summary.paper) == {"kvarena"}, "another load is not Fig 18b"
    assert set(rows.system) == {"paged/vllm2023"}
    assert rows.set_index("x").evidence.to_dict() == {4: "conditional", 16: "predicted", 256: "predicted"}
    waste = summary[summary.quantity == "last_block_waste_vs_block_size"].set_index("x").value
    assert waste[4] < waste[16] < 5 < waste[256] < 50
    assert latency(summary)[16] < latency(summary)[256], "large blocks leave room for fewer requests"
    across = summary[summary.quantity == "normalized_latency"]
    assert len(across) == 3, "vAttention has no blocks: one point each"
    assert across.x.isna().all()
    assert set(across.allocator) == {"vattention"}


def test_a_kernels_cost_makes_its_block_size_slower_and_conditional(summary_of: Callable[..., pd.DataFrame]) -> None:
    free = latency(summary_of("block_size", *SHORT, PAGED))
    summary = summary_of("block_size", *SHORT, PAGED, "params.kernel_cost={4: 3.0, 256: 1.0}")
    costly = latency(summary)
    assert costly[4] > 1.05 * free[4]
    assert costly[16] == free[16]
    assert costly[256] == free[256]
    evidence = summary[summary.quantity == "normalized_latency_vs_block_size"].set_index("x").evidence
    assert evidence.to_dict() == {4: "conditional", 16: "predicted", 256: "conditional"}


def test_last_block_waste_is_half_a_block_per_request() -> None:
    run = compose_run("experiment=block_size", PAGED, *SHORT)
    served = Replayer(run).serve(run.systems[0], workload_of(run, rate=1.0))
    found = measures(served)
    tokens = served.steps.live.sum() / served.steps.steps.sum() / run.model.kv_layout().token_bytes
    expected = 7.5 * found["mean_batched_requests"]  # of 16 tokens 0 to 15 are empty
    assert found["last_block_waste"] == pytest.approx(100 * expected / (tokens + expected), rel=0.15)


def test_a_file_of_lengths_is_read_for_the_runs_own_trace_too(tmp_path: Path) -> None:
    lengths = tmp_path / "lengths.csv"
    lengths.write_text("prompt_tokens,output_tokens\n" + "100,20\n" * 200)

    run = compose_run("experiment=block_size", f"params.paths.sharegpt={lengths}")
    workload = workload_of(run, trace_named(run, "sharegpt", run.params.paths["sharegpt"]), rate=0.1)
    assert set(workload.prompt_tokens) == {100}


def test_measured_it_runs_the_kernel_with_every_block_size(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of("block_size", *TINY, PAGED)
    rows = summary[summary.quantity == "normalized_latency_vs_block_size"]
    assert set(zip(rows.paper, rows.system, rows.evidence, rows.n, strict=True)) == {
        ("kvarena", "paged/numba", "measured", 2)
    }
    assert set(rows.x) == {1, 16}
    assert (rows.value > 0).all()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("params.block_sizes=[]", "at least one"),
        ("params.block_sizes=[16,16]", "none twice"),
        ("params.block_sizes=[512]", "from 1 to 256"),
        ("params.kernel_cost={8: 2.0}", "for one of"),
        ("params.kernel_cost={16: 0.0}", "above 0"),
        ("params.rates={sharegpt: 0.0}", "rate"),
        ("params.rates={nothing: 1.0}", "no such trace"),
    ],
)
def test_what_cannot_be_is_refused(override: str, said: str, summary_of: Callable[..., pd.DataFrame]) -> None:
    key = override.partition("=")[0]
    with pytest.raises(UserError, match=said):
        summary_of("block_size", *[s for s in SHORT if not s.startswith(key)], PAGED, override)


def test_a_kernels_cost_is_for_the_modelled_clock(summary_of: Callable[..., pd.DataFrame]) -> None:
    with pytest.raises(UserError, match="clock=modelled"):
        summary_of("block_size", *TINY, PAGED, "params.kernel_cost={16: 2.0}")


@pytest.mark.parametrize(
    "overrides",
    [
        ("engine=vllm2023_folded", "params.kernel_cost={16: 3.0}"),
        ("engine=lean", "params.kernel_cost={16: 0.5}"),  # faster than the device can read
    ],
)
def test_a_cost_that_no_constant_of_the_engine_can_have_is_refused(overrides: tuple[str, ...]) -> None:
    run = compose_run(*DEFAULTS, *SHORT, PAGED, *overrides)
    with pytest.raises(UserError, match="Engines that can"):
        block_size._check(run)


@pytest.mark.parametrize("overrides", [
    (PAGED, "engine=lean"), ("systems=[paged-fa2]", "engine=sarathi2024", "device=a100-80gb", "model=yi-6b"),
])  # fmt: skip
def test_a_cost_slows_whatever_reads_kv(overrides: tuple[str, ...]) -> None:
    run = compose_run(*DEFAULTS, *overrides, "params.kernel_cost={16: 3.0}")
    block_size._check(run)


def earned_panel(*overrides: str, trace: str = "sharegpt", **point: object) -> str | None:
    """The published panel that vLLM's row at 16 would have."""
    run = compose_run(*DEFAULTS, *overrides)
    names = named(block_size._of_trace(run, trace), run.systems[0], "fig18b", kernel_cost=None, x=16)
    return names["panel"] if is_earned(names) else None


def test_with_the_defaults_both_panels_are_earned_by_vllm_alone() -> None:
    assert earned_panel() == "ShareGPT"
    assert earned_panel(trace="alpaca") == "Alpaca"
    run = compose_run(*DEFAULTS)
    assert not any(is_earned(named(run, system, "fig18b", kernel_cost=None)) for system in run.systems[1:])


@pytest.mark.parametrize(
    "override",
    [
        "device=a100-80gb engine=lean", "engine=lean", "engine=vllm2023_folded", "model=opt-66b",
        "model=opt-13b model.dtype=float32", "model=opt-13b model.tp=2", "arrival.duration_s=300", "arrival.seed=3",
        "params.rates={sharegpt:2.5}", "trace.max_tokens=1024", "params.pool_bytes=12897484800",
        "allocator=paged allocator.watermark=0.1", "scheduler=chunked_prefill", "decoding=parallel",
    ],
)  # fmt: skip
def test_whatever_changes_the_figure_loses_its_name(override: str) -> None:
    assert earned_panel(*override.split(), "systems=[paged]") is None


def test_a_given_cost_is_not_the_figures_kernel() -> None:
    run = compose_run(*DEFAULTS)
    assert not is_earned(named(block_size._of_trace(run, "sharegpt"), run.systems[0], "fig18b", kernel_cost=2.0))
