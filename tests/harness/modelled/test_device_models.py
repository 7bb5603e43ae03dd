"""Devices and engines as data, the step model's arithmetic, and the size of a K/V pool."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from kvarena.allocators.policy import CopyBlock, Map, SwapIn, SwapOut, Unmap
from kvarena.errors import UserError
from kvarena.harness.config import load, names, typed
from kvarena.harness.model import ModelConfig
from kvarena.harness.modelled.device_model import DeviceConfig
from kvarena.harness.modelled.engine_config import EngineConfig
from kvarena.harness.modelled.kv_pool import kv_pool_bytes
from kvarena.harness.modelled.modelled_executor import ActionPrices, ModelledExecutor, load_of
from kvarena.harness.modelled.roofline import step_model_of
from kvarena.harness.modelled.step_model import StepLoad, StepModel
from kvarena.harness.requests.request import Request
from kvarena.harness.scheduler.step import PrefillChunk, StepPlan

MS = 10**9  # picoseconds


def merged(group, name, fields):
    return OmegaConf.merge(load(group, name), fields)


def device(name, **fields) -> DeviceConfig:
    return typed(DeviceConfig, merged("device", name, fields), "device")


def engine(name) -> EngineConfig:
    return typed(EngineConfig, load("engine", name), "engine")


def model(name, **fields) -> ModelConfig:
    return typed(ModelConfig, merged("model", name, fields), "model")


# ---- data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names("device"))
def test_every_device_file_is_whole(name):
    config = device(name)
    assert config.name == name
    if config.kind == "modelled":
        llama = model("llama-3-8b", tp=2)
        assert step_model_of(config, engine("lean"), llama, "vllm", None).token_ps > 0
        assert kv_pool_bytes(config, llama) > 0


@pytest.mark.parametrize("name", names("engine"))
def test_every_engine_file_is_whole(name):
    config = engine(name)
    assert config.name == name
    for key, step in config.fitted.items():
        of, _, scheduler = key.partition("/")
        there = device(step.device or "a100-40gb"), config, model(of, tp=step.tp)
        assert step_model_of(*there, scheduler or "vllm", None).host_step_ps > 0


def test_a_device_model_without_a_number_says_which():
    with pytest.raises(UserError, match=r"device.bandwidth_gb_per_s=None \(cpu\)"):
        step_model_of(device("cpu"), engine("lean"), model("opt-13b"), "vllm", None)
    with pytest.raises(UserError, match=r"device.tflop_per_s=0"):
        step_model_of(device("h100", tflop_per_s=0), engine("lean"), model("opt-13b"), "vllm", None)
    with pytest.raises(UserError, match=r"device.kind=tpu"):
        device("h100", kind="tpu")


def test_an_engine_without_constants_for_a_model_names_those_it_has():
    with pytest.raises(UserError, match=r"engine=vllm2023 .*model=yi-6b .* opt-13b, opt-13b/faster"):
        step_model_of(device("a100-40gb"), engine("vllm2023"), model("yi-6b"), "vllm", None)


def test_an_efficiency_is_a_share():
    with pytest.raises(UserError, match=r"engine.kv_efficiency=1.5 \(lean\).* 0, .* 1"):
        typed(EngineConfig, merged("engine", "lean", {"kv_efficiency": 1.5}), "engine")


# ---- the fitted engine, and the roofline ---------------------------------------------------------------------------


def test_the_engine_of_2023_by_hand():
    fitted = step_model_of(device("a100-40gb"), engine("vllm2023"), model("opt-13b"), "vllm", None)
    assert fitted.step_ps(StepLoad(30, 30, 9000)) == 12 * MS + 165 * MS // 10 + 30 * 340_000_000 + 9000 * 527_000
    prefill = fitted.step_ps(StepLoad(1000, 0, 0, pairs=500_500))
    assert prefill == 12 * MS + 130 * MS, "tokens now cost more than the weights"
    padded = step_model_of(device("a100-40gb"), engine("vllm2023"), model("opt-13b"), "fastertransformer", None)
    assert padded.step_ps(StepLoad(6, 6, 9000)) == round(3.5 * MS) + round(16.5 * MS) + 6 * 1200 * MS // 1000


def test_the_roofline_by_hand():
    opt = model("opt-13b")
    lean = step_model_of(device("a100-40gb"), engine("lean"), opt, "vllm", None)
    assert lean.weights_ps == pytest.approx(16.5 * MS, rel=0.01), "25.7 GB over 1555 GB/s"
    assert lean.token_ps == pytest.approx(2 * opt.step_parameters() / (0.6 * 312e12) * 1e12, rel=1e-6)
    assert lean.context_ps == pytest.approx(819_200 / 1555e9 / 0.667 * 1e12, rel=1e-6)
    assert lean.pair_ps == pytest.approx(4 * 40 * 5120 / (0.6 * 312e12) * 1e12, rel=0.01), "whole picoseconds"
    assert lean.link_step_ps == 0


def test_a_kernel_that_reads_per_query_head_reads_as_often():
    """Yi-6B has 32 query heads on 4 KV heads, of 128 elements in 32 layers."""
    at = device("a100-80gb"), engine("sarathi2024"), model("yi-6b"), "vllm"
    costs = engine("sarathi2024").attention
    for kernel, times in (("vllm_paged/paged", 8), ("fa2/paged", 1)):
        seconds = 2 * 4 * 128 * 32 * 2 * times / (at[0].bandwidth_gb_per_s * 1e9 * costs[kernel].read_efficiency)
        assert step_model_of(*at, kernel).context_ps == pytest.approx(seconds * 1e12, rel=1e-4)


def test_tensor_parallelism_divides_the_work_and_adds_all_reduces():
    one, four = (
        step_model_of(device("a100-40gb"), engine("lean"), model("opt-66b", tp=tp), "vllm", None) for tp in (1, 4)
    )
    for name in ("weights_ps", "token_ps", "context_ps", "pair_ps"):
        assert getattr(one, name) == pytest.approx(4 * getattr(four, name), rel=1e-3)
    assert four.link_step_ps == 2 * 64 * 10 * 10**6
    assert four.link_token_ps == pytest.approx(128 * 1.5 * 9216 * 2 / 300e9 * 1e12, rel=1e-6)


def test_host_and_device_overlap_or_take_turns():
    coefficients = {"host_step_ps": 1000, "host_sequence_ps": 10, "weights_ps": 300, "token_ps": 5, "context_ps": 2}
    links = {"pair_ps": 3, "link_step_ps": 40, "link_token_ps": 7}
    load = StepLoad(tokens=100, decodes=4, context=50, pairs=20)
    host, device = 1000 + 4 * 10, 500 + 50 * 2 + 20 * 3 + 40 + 100 * 7
    assert StepModel(overlaps_host=False, **coefficients, **links).step_ps(load) == host + device
    assert StepModel(overlaps_host=True, **coefficients, **links).step_ps(load) == max(host, device) == device
    assert StepModel(overlaps_host=True, **coefficients).step_ps(load) == host


# ---- steps and stretches -------------------------------------------------------------------------------------------

COEFFICIENTS = st.integers(0, 50)
MODELS = st.builds(
    StepModel,
    overlaps_host=st.booleans(),
    host_step_ps=st.integers(1, 3000),
    host_sequence_ps=COEFFICIENTS,
    weights_ps=st.integers(1, 2000),
    token_ps=COEFFICIENTS,
    context_ps=COEFFICIENTS,
    pair_ps=COEFFICIENTS,
    link_step_ps=COEFFICIENTS,
    link_token_ps=COEFFICIENTS,
    launch_ps=st.integers(0, 4000),
)


@given(step_model=MODELS, decodes=st.integers(1, 9), context=st.integers(1, 90), gap=st.integers(1, 200_000))
def test_a_stretch_is_its_steps(step_model, decodes, context, gap):
    run = step_model.steady(StepLoad(decodes, decodes, context))
    walked = [step_model.step_ps(StepLoad(decodes, decodes, context + j * decodes)) for j in range(80)]
    for j in range(min(run.steps, 80)):
        assert run.duration_ps(j + 1) == sum(walked[: j + 1])
        assert run.take(j + 1).slope_ps == (run.slope_ps if j else 0)
    if run.steps < 80:
        assert walked[run.steps] != run.first_ps + run.steps * run.slope_ps, "it ends where the branch changes"
    steps = run.steps_to(gap)
    assert run.duration_ps(steps) >= gap > run.duration_ps(steps - 1)


def test_the_load_of_a_plan():
    decoding = [Request(i, 10, 5, computed=12 + i, generated=3 + i) for i in range(2)]
    prompt = Request(2, 8, 5)
    plan = StepPlan(decodes=decoding, prefills=[PrefillChunk(prompt, 4, 3)], padding=5)
    assert load_of(plan) == StepLoad(tokens=2 + 3 + 5, decodes=2, context=13 + 14, pairs=5 + 6 + 7)


def test_actions_are_paid_for_before_the_step_and_beside_it():
    prices = ActionPrices(copy_block_ps=7, swap_out_ps=11, swap_in_ps=13, map_ps=(100, 900), unmap_ps=(17, 19))
    executor = ModelledExecutor(StepModel(False, 500, 0, 0, 0, 0), prices)
    plan = StepPlan(decodes=[Request(0, 4, 4, computed=4, generated=1)])
    assert executor.execute(plan) == (500, 0, 0)
    plan.actions = [SwapOut(1, 2), SwapIn(2, 1), CopyBlock(0, 3), Map(0, 1, 2, 3), Unmap(1, 1, 2, 3)]
    assert executor.execute(plan) == (500 + 11 + 13 + 7 + 100 + 19, 150, 0)
    plan.actions, plan.ahead = [], [Map(0, 1, 2, 3)] * 5
    assert executor.execute(plan) == (500, 0, 0), "hidden behind the step"
    plan.ahead = [Map(1, 1, 2, 3)]
    assert executor.execute(plan) == (900, 400, 0), "what outlasts the step is waited for"


# ---- the pool ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "gpu", "tp", "blocks"),
    [
        ("opt-13b", "a100-40gb", 1, range(984, 985)),
        ("opt-66b", "a100-40gb", 4, range(605, 606)),
        ("opt-175b", "a100-80gb", 8, range(3754, 3760)),
        ("llama-13b", "a100-40gb", 1, range(973, 975)),
    ],
)
def test_the_pools_of_pagedattention(name, gpu, tp, blocks):
    """Its Table 1, in blocks of 16 tokens, from the memory of the devices."""
    config = model(name, tp=tp)
    assert kv_pool_bytes(device(gpu), config) // (16 * config.kv_layout().token_bytes) in blocks


def test_a_model_that_leaves_nothing_for_its_cache_is_refused():
    with pytest.raises(UserError, match=r"model=opt-66b .*device=a100-40gb.*model.tp"):
        kv_pool_bytes(device("a100-40gb"), model("opt-66b", tp=1))
