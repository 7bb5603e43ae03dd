"""vAttention's figures: under the modelled clock as its paper has them, and small for real."""

from collections.abc import Callable

import pandas as pd
import pytest

from kvarena.errors import UserError
from kvarena.experiments.compose import compose_run
from kvarena.experiments.long_contexts import runs_of_long_contexts
from kvarena.experiments.published_models import runs_by_model

LENGTHS = "prompt_tokens,output_tokens\n64000,60\n90000,200\n70000,20\n80000,90\n"


def values(summary: pd.DataFrame, quantity: str, *index: str) -> pd.Series:
    return summary[summary.quantity == quantity].set_index(list(index)).value


def test_every_model_of_a_figure_runs_and_a_named_one_runs_alone() -> None:
    modelled = compose_run("experiment=decode_throughput", "clock=modelled")
    assert [(r.model.name, r.model.tp) for r in runs_by_model(modelled)] == [
        ("yi-6b", 1), ("llama-3-8b", 2), ("yi-34b", 2)
    ]  # fmt: skip
    named = compose_run("experiment=decode_throughput", "clock=modelled", "model=yi-34b", "model.tp=2")
    assert [(r.model.name, r.model.tp) for r in runs_by_model(named)] == [("yi-34b", 2)]


def test_decode_throughput_at_scale(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of(
        "decode_throughput", "clock=modelled", "params.batch_sizes=[1,16,32]", "params.steps_per_round=40",
        "systems=[paged-fa2,paged-vllm-kernel,vattention-fa2,static-fa2]",
    )  # fmt: skip
    decode = values(summary, "decode_throughput_vs_batch", "panel", "system", "x")
    assert ("Yi-34B", "FA2_Paged", 32) not in decode.index, "its K/V does not fit"
    assert decode["Yi-6B", "FA2_vAttention", 32] == pytest.approx(795, rel=0.05)
    assert decode["Yi-6B", "FA2_vAttention", 32] > 1.7 * decode["Yi-6B", "vLLM", 32]
    kinds = summary[summary.quantity == "decode_throughput_vs_batch"].set_index(["panel", "system", "x"]).evidence
    assert kinds["Yi-6B", "FA2_Paged", 1] == "calibrated"
    assert kinds["Yi-6B", "FA2_Paged", 16] == kinds["Yi-34B", "FA2_Paged", 1] == "predicted"
    maps = values(summary, "actions_per_step_vs_batch", "panel", "system", "x")
    assert (maps == 0).all(), "prompts end with a page-group, and the next was mapped beside the step before the first"
    assert (values(summary, "allocator_stall_vs_batch", "panel", "system", "x") == 0).all()


def test_prefill_throughput_at_scale(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of("prefill_throughput", "clock=modelled", "params.contexts=[16384,65536]")
    times = values(summary, "prefill_time_vs_context", "panel", "system", "x")
    assert times["Yi-6B", "FA2_Paged", 65536] == pytest.approx(10.6, rel=0.02)
    stall = values(summary, "allocator_stall_vs_context", "panel", "system", "x")
    first = values(summary, "first_prompt_stall_vs_context", "panel", "system", "x")
    assert stall["Yi-6B", "FA2_vAttention", 16384] == 0, "the second prompt inherits the row of the first"
    assert first["Yi-6B", "FA2_vAttention", 16384] == pytest.approx(8 * 64 * 0.04, rel=0.1), "8 groups in 64 tensors"
    ratios = values(summary, "prefill_kernel_time_ratio_vs_context", "panel", "system", "x")
    assert ratios["Llama-3-8B", "FA2_Paged / FA2", 16384] == pytest.approx(0.662 / 0.523, rel=1e-3)


def test_prefill_throughput_for_real(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of(
        "prefill_throughput", "device=cpu", "model=tiny-llama", "params.contexts=[16,48]", "params.rounds=2",
        "params.pool_bytes=1048576",
        "systems=[static-numba,paged-numba,vattention-numba]",
    )  # fmt: skip
    assert set(summary.evidence) == {"measured"}
    ratios = summary[summary.quantity == "prefill_kernel_time_ratio_vs_context"]
    assert set(ratios.system) == {
        "paged/numba / static/numba", "paged/numba / vattention/numba", "vattention/numba / static/numba"
    }  # fmt: skip
    assert (summary[summary.quantity == "prefill_throughput_vs_context"].n == 2).all()


def test_offline_throughput_at_scale(summary_of: Callable[..., pd.DataFrame], tmp_path) -> None:
    lengths = tmp_path / "lengths.csv"
    lengths.write_text(LENGTHS)
    summary = summary_of(
        "offline_throughput",
        f"trace.path={lengths}",
        "trace.num_requests=4",
        "systems=[paged-fa2,paged-flashinfer,vattention-fa2]",
    )
    speed = values(summary, "offline_throughput", "panel", "system")
    assert speed["Llama-3-8B", "FA2_vAttention"] > speed["Llama-3-8B", "FA2_Paged"] > speed["Yi-34B", "FA2_Paged"]
    assert (values(summary, "finished", "panel", "system") == 4).all()
    span = values(summary, "makespan", "panel", "system")
    assert speed.tolist() == pytest.approx((240 / span[speed.index]).tolist())
    assert set(summary.evidence) == {"predicted"}
    assert set(summary[summary.quantity == "offline_throughput"].figure) == {"fig9"}


def test_made_up_lengths_and_links_are_conditional(summary_of: Callable[..., pd.DataFrame], tmp_path) -> None:
    few = ("systems=[vattention-fa2]", "model=yi-6b", "params.models={yi-6b: 1}")
    assert set(summary_of("offline_throughput", *few, "trace.num_requests=3").evidence) == {"conditional"}
    lengths = tmp_path / "lengths.csv"
    lengths.write_text(LENGTHS)
    assumed = ("device=h100-pcie-link", "engine=sarathi2024_h100", f"trace.path={lengths}", "trace.num_requests=4")
    summary = summary_of("offline_throughput", *few, *assumed)
    assert set(summary.evidence) == {"conditional"}
    assert "fig11" in set(summary.figure)


def test_the_pool_is_the_share_of_memory_that_the_engine_was_given() -> None:
    pools = [
        runs_of_long_contexts(compose_run("experiment=offline_throughput", f"params.memory_share={share}"))[0]
        for share in (0.8, 0.9)
    ]
    gained = pools[1].params.pool_bytes - pools[0].params.pool_bytes
    assert gained == pytest.approx(0.1 * 79.17 * 2**30, rel=1e-3)


def test_online_latency_at_scale(summary_of: Callable[..., pd.DataFrame], tmp_path) -> None:
    lengths = tmp_path / "lengths.csv"
    lengths.write_text("prompt_tokens,output_tokens\n" + "".join(f"{24000 + 97 * i},{40 + i}\n" for i in range(24)))
    summary = summary_of(
        "online_latency", f"trace.path={lengths}", "trace.num_requests=24", "systems=[paged-flashinfer,vattention-fa2]",
        "params.models={yi-6b: 1}", "params.rates={yi-6b: [0.25]}", "params.shares=[0.5,0.9]", "params.slower=[1.3]",
    )  # fmt: skip
    capacity = values(summary, "capacity", "system")
    assert capacity["FA2_vAttention"] > capacity["FI_Paged"]
    median_s = values(summary, "request_latency_p50_vs_qps", "system")
    slower_s = values(summary, "request_latency_p50_vs_qps:steps_1.3x", "system")
    assert (slower_s > 1.3 * median_s).all(), "queues make more of it than the steps do"
    assert (values(summary, "request_latency_max_vs_qps", "system") > median_s).all()
    ttft = values(summary, "ttft_p99_vs_share_of_capacity", "system", "x")
    assert ttft["FI_Paged", 0.9] > ttft["FI_Paged", 0.5]
    kinds = summary.groupby("quantity").evidence.first()
    assert kinds["request_latency_p50_vs_qps"] == "predicted"
    assert kinds["request_latency_p50_vs_qps:steps_1.3x"] == "conditional"


@pytest.mark.parametrize("experiment", ["offline_throughput", "online_latency"])
def test_replays_of_long_prompts_for_real(summary_of: Callable[..., pd.DataFrame], experiment: str) -> None:
    summary = summary_of(
        experiment, "clock=measured", "device=cpu", "model=tiny-llama", "trace.num_requests=5",
        "trace.prompt_tokens=30", "trace.output_tokens=4", "trace.max_tokens=64", "params.pool_bytes=1048576",
        "scheduler.token_budget=64", "scheduler.max_seqs=8", "systems=[paged-numba,static-numba]",
    )  # fmt: skip
    assert set(summary.evidence) == {"measured"}
    assert set(summary.clock) == {"measured"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("params.shares=[0]", "params.shares"),
        ("params.slower=[-1.0]", "params.slower"),
        ("clock=measured device=cpu params.slower=[1.1]", "clock=measured takes as long as it takes"),
        ("params.shares=[] params.rates={}", "nothing to serve"),
    ],
)
def test_bad_loads_are_refused(finished: Callable, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        finished("online_latency", *override.split())
