"""vAttention's figures: under the modelled clock as its paper has them, and small for real."""

from collections.abc import Callable

import pandas as pd
import pytest

from kvarena.errors import UserError
from kvarena.experiments.command.compose import compose_run
from kvarena.experiments.kit.long_contexts import runs_of_long_contexts
from kvarena.experiments.kit.published_models import runs_by_model
from kvarena.experiments.vattention.decode_modelled import named_at
from kvarena.harness.files.content import sha256
from kvarena.harness.run.published import named
from kvarena.harness.trace import published_files

LENGTHS = "prompt_tokens,output_tokens\n64000,60\n90000,200\n70000,20\n80000,90\n"


def values(summary: pd.DataFrame, quantity: str, *index: str) -> pd.Series:
    return summary[summary.quantity == quantity].set_index(list(index)).value


def earned(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows.paper == "vattention"]


@pytest.fixture
def listed(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """`listed(trace, text)` is the path of a file that counts as the published one of that trace."""

    def write(trace: str, text: str) -> str:
        path = tmp_path / "lengths.csv"
        path.write_text(text)
        known = (sha256(path), trace)
        monkeypatch.setattr(published_files, "_listed", lambda: {known})
        return str(path)

    return write


def test_every_model_of_a_figure_runs_and_a_named_one_runs_alone() -> None:
    def models(*overrides: str) -> list[tuple[str, int]]:
        run = compose_run("experiment=decode_throughput", "clock=modelled", *overrides)
        return [(r.model.name, r.model.tp) for r in runs_by_model(run, run.params.models)]

    assert models() == [("yi-6b", 1), ("llama-3-8b", 2), ("yi-34b", 2)]
    assert models("model=yi-34b") == [("yi-34b", 2)], "on as many devices as the paper"
    assert models("model=yi-6b") == [("yi-6b", 1)], "the profile's own, named, is alone too"
    assert models("model=yi-34b", "model.tp=4") == [("yi-34b", 4)]
    assert models("params.models={llama-3-8b: 1}") == [("llama-3-8b", 1)], "not the profile's model"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("clock=modelled model.dtype=float32", "params.models"),
        ("clock=modelled model=yi-6b params.models={yi-6b:1}", "is run alone"),
        ("clock=measured device=cpu params.models={tiny-llama:1}", "model=NAME"),
        ("clock=modelled params.max_tokens=20000", "params.prompts"),
        ("clock=modelled scheduler.max_seqs=64", "params.batch_sizes"),
        ("clock=modelled allocator=paged allocator.watermark=0.5", "nobody waits"),
        ("clock=measured device=cpu params.prompts=['40'] trace.seed=3", "prompts of a trace"),
    ],
)
def test_keys_of_what_is_not_run_are_refused(overrides: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        compose_run("experiment=decode_throughput", *overrides.split())


CHANGES = (
    "model.dtype=float32", "model.tp=4", "device=a100-40gb engine=lean", "device=h200 engine=lean", "engine=lean",
    "scheduler=sarathi", "params.pool_bytes=60000000000",
    "allocator=paged allocator.block_size=32",
    "params.steps_per_round=40",
)  # fmt: skip


@pytest.mark.parametrize("changed", ["", *CHANGES])
def test_fig_8_is_earned_by_what_it_ran_with_alone(changed: str) -> None:
    run = compose_run("experiment=decode_throughput", "clock=modelled", "model=yi-6b", *changed.split())
    [one] = runs_by_model(run, run.params.models)
    systems = {system.name: named_at(one, system, "16384", "fig8", x=16) for system in run.systems}
    names = {name: row["system"] for name, row in systems.items() if row["paper"] == "vattention"}
    published = {"paged-vllm-kernel": "vLLM", "paged-fa2": "FA2_Paged", "paged-flashinfer": "FI_Paged",
                 "vattention-fa2": "FA2_vAttention"}  # fmt: skip
    assert names == ({} if changed else published)
    labels = [row["label"] for row in systems.values()]
    assert len(set(labels)) == len(labels)
    assert {row["panel"] for row in systems.values() if row["paper"] == "vattention"} <= {"Yi-6B"}


def test_decode_throughput_at_scale(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of(
        "decode_throughput", "clock=modelled", "params.batch_sizes=[1,16,32]",
        "systems=[paged-fa2,paged-vllm-kernel,vattention-fa2,static-fa2]",
    )  # fmt: skip
    fig8 = earned(summary[summary.quantity == "decode_throughput_vs_batch"])
    decode = fig8.set_index(["panel", "system", "x"]).value
    assert ("Yi-34B", "FA2_Paged", 32) not in decode.index, "its K/V does not fit"
    assert decode["Yi-6B", "FA2_vAttention", 32] == pytest.approx(795, rel=0.05)
    assert decode["Yi-6B", "FA2_vAttention", 32] > 1.7 * decode["Yi-6B", "vLLM", 32]
    assert set(summary[summary.allocator == "static"].paper) == {"kvarena"}, "Fig 8 has no static rows"
    kinds = fig8.set_index(["panel", "system", "x"]).evidence
    assert kinds["Yi-6B", "FA2_Paged", 1] == "calibrated"
    assert kinds["Yi-6B", "FA2_Paged", 16] == kinds["Yi-34B", "FA2_Paged", 1] == "predicted"
    maps = values(summary, "actions_per_step_vs_batch", "model", "label", "x")
    assert (maps == 0).all(), "prompts end with a page-group, and the next was mapped beside the step before the first"
    assert (values(summary, "allocator_stall_vs_batch", "model", "label", "x") == 0).all()


def test_every_prompt_length_runs_and_what_has_no_room_anywhere_is_refused(
    summary_of: Callable[..., pd.DataFrame],
) -> None:
    few = ("clock=modelled", "model=yi-6b", "systems=[paged-fa2]", "params.batch_sizes=[2]")
    summary = summary_of("decode_throughput", *few, "params.prompts=['1024','4096']")
    step_ms = values(summary, "step_time_vs_batch", "setup")
    assert len(step_ms) == 2
    with pytest.raises(UserError, match="none has room"):
        summary_of("decode_throughput", *few, "params.pool_bytes=1000000")
    with pytest.raises(UserError, match="takes a number of tokens"):
        summary_of("decode_throughput", *few, "params.prompts=[trace]")


def test_prefill_throughput_at_scale(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of("prefill_throughput", "clock=modelled", "params.contexts=[16384,65536]")
    times = values(earned(summary), "prefill_time_vs_context", "panel", "system", "x")
    assert times["Yi-6B", "FA2_Paged", 65536] == pytest.approx(10.6, rel=0.02)
    stall = values(summary, "allocator_stall_vs_context", "model", "label", "x")
    first = values(summary, "first_prompt_stall_vs_context", "model", "label", "x")
    assert stall["yi-6b", "vattention/fa2", 16384] == 0, "the second prompt inherits the row of the first"
    assert first["yi-6b", "vattention/fa2", 16384] == pytest.approx(8 * 64 * 0.04, rel=0.1), "8 groups in 64 tensors"
    ratios = values(earned(summary), "prefill_kernel_time_ratio_vs_context", "panel", "system", "x")
    assert ratios["Llama-3-8B", "FA2_Paged / FA2", 16384] == pytest.approx(0.662 / 0.523, rel=1e-3)
    assert set(ratios.index.get_level_values("panel")) == {"Llama-3-8B"}, "Fig 2 has the heads of one model"
    lines = {"FA2_Paged / FA2", "FI_Paged / FI", "FI / FA2", "FI_Paged / FA2"}
    assert set(ratios.index.get_level_values("system")) == lines


def test_prefills_of_another_device_are_ours(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of("prefill_throughput", "clock=modelled", "device=h200", "engine=lean", "params.contexts=[1024]")
    assert set(summary.paper) == {"kvarena"}
    assert set(summary.evidence) == {"predicted"}


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


def test_offline_throughput_at_scale(
    summary_of: Callable[..., pd.DataFrame], listed: Callable[[str, str], str]
) -> None:
    lengths = listed("vattention_offline", "prompt_tokens,output_tokens\n" + "".join(
        f"{64000 + 60 * i},{20 + i % 7}\n" for i in range(427)
    ))  # fmt: skip
    summary = summary_of(
        "offline_throughput", f"trace.path={lengths}", "systems=[paged-fa2,paged-flashinfer,vattention-fa2,static-fa2]"
    )
    fig9 = earned(summary[summary.quantity == "offline_throughput"])
    assert set(fig9.figure) == {"fig9"}
    speed = fig9.set_index(["panel", "system"]).value
    assert speed["Llama-3-8B", "FA2_vAttention"] > speed["Llama-3-8B", "FA2_Paged"] > speed["Yi-34B", "FA2_Paged"]
    assert set(summary[summary.allocator == "static"].paper) == {"kvarena"}, "Fig 9 has no static rows"
    speed = values(summary, "offline_throughput", "model", "label")
    assert (values(summary, "finished", "model", "label") == 427).all()
    span = values(summary, "makespan", "model", "label")
    assert speed.tolist() == pytest.approx((427 * 60 / span[speed.index]).tolist())
    assert set(summary.evidence) == {"predicted"}


def test_somebodys_own_requests_are_ours(summary_of: Callable[..., pd.DataFrame], tmp_path) -> None:
    lengths = tmp_path / "mine.csv"
    lengths.write_text(LENGTHS)
    summary = summary_of("offline_throughput", "model=yi-6b", f"trace.path={lengths}", "trace.num_requests=4")
    assert set(summary.paper) == {"kvarena"}
    assert set(summary.setup) == {"yi-6b mine.csv, 1 x a100-80gb"}
    assert set(summary.evidence) == {"predicted"}


def test_made_up_lengths_and_links_are_conditional(
    summary_of: Callable[..., pd.DataFrame], listed: Callable[[str, str], str]
) -> None:
    few = ("systems=[vattention-fa2]", "model=yi-6b")
    made_up = summary_of("offline_throughput", *few, "trace.num_requests=3")
    assert set(made_up.evidence) == {"conditional"}
    assert set(made_up.paper) == {"kvarena"}
    lengths = listed("vattention_offline", LENGTHS)
    assumed = ("device=h100-pcie-link", "engine=sarathi2024_h100", f"trace.path={lengths}", "trace.num_requests=4")
    summary = summary_of("offline_throughput", *few, *assumed)
    assert set(summary.evidence) == {"conditional"}
    assert set(summary.paper) == {"kvarena"}, "how the paper's pair was linked is not known"


def test_fig_11_is_earned_on_an_h100_and_calibrated_at_one_point(listed: Callable[[str, str], str]) -> None:
    path = listed("vattention_offline", LENGTHS)
    run = compose_run("experiment=offline_throughput", "device=h100", "engine=sarathi2024_h100", "model=yi-6b",
                      f"trace.path={path}", "systems=[paged-fa2,vattention-fa2,vattention-fa3]")  # fmt: skip
    rows = [named(run, system, "fig11") for system in run.systems]
    assert [(row["panel"], row["system"], row["evidence"]) for row in rows] == [
        ("Yi-6B", "FA2_Paged", "predicted"), ("Yi-6B", "FA2_vAttention", "calibrated"),
        ("Yi-6B", "FA3_vAttention", "calibrated"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "changed",
    ["trace.num_requests=100", "trace.seed=1 trace.shuffle=true", "arrival.seed=7", "arrival=poisson",
     "params.context=70000",
     "params.memory_share=0.8", "params.pool_bytes=40000000000", "scheduler=sarathi", "decoding=parallel decoding.n=2"],
)  # fmt: skip
def test_fig_10_is_earned_by_its_own_requests_and_arrivals_alone(
    changed: str, listed: Callable[[str, str], str]
) -> None:
    path = listed("vattention_online", LENGTHS)

    def paper(*overrides: str) -> str:
        run = compose_run("experiment=online_latency", "model=yi-6b", f"trace.path={path}", *overrides)
        return named(runs_by_model(run, run.params.models)[0], run.systems[0], "fig10", x=0.2)["paper"]

    assert paper() == "vattention"
    assert paper(*changed.split()) == "kvarena"


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
    capacity = values(summary, "capacity", "label")
    assert capacity["vattention/fa2"] > capacity["paged/flashinfer"]
    median_s = values(summary, "request_latency_p50_vs_qps", "label")
    slower_s = values(summary, "request_latency_p50_vs_qps:steps_1.3x", "label")
    assert (slower_s > 1.3 * median_s).all(), "queues make more of it than the steps do"
    assert (values(summary, "request_latency_max_vs_qps", "label") > median_s).all()
    ttft = values(summary, "ttft_p99_vs_share_of_capacity", "label", "x")
    assert ttft["paged/flashinfer", 0.9] > ttft["paged/flashinfer", 0.5]
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
    assert set(summary.paper) == {"kvarena"}


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
