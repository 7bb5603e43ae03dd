"""Step models for a pair of engine and model: fitted constants where there are any, else the device's limits."""

from kvarena.harness.model.config import DTYPE_BYTES, ModelConfig
from kvarena.harness.modelled.device_model import DeviceConfig
from kvarena.harness.modelled.engine_config import EngineConfig, FittedStep
from kvarena.harness.modelled.engine_fit import check_engine
from kvarena.harness.modelled.step_model import PS_PER_S, StepModel

_PS_PER_MS = PS_PER_S // 1000
_PS_PER_US = PS_PER_S // 10**6


def step_model_of(
    device: DeviceConfig, engine: EngineConfig, model: ModelConfig, scheduler: str, attention: str | None
) -> StepModel:
    """The step model of `model` served by `engine` on `model.tp` devices.

    `attention` is `System.attention_key`; None where no kernel is named, for engines that tell none apart.

    Raises UserError where a device lacks a number, or the engine was fitted on something else.
    """
    check_engine(engine, device, model, scheduler)
    fitted = engine.constants(model.name, scheduler)
    if fitted is not None:
        return _fitted_model(fitted, engine.overlaps_host)
    return roofline(device, engine, model, attention)


def _fitted_model(fitted: FittedStep, overlaps_host: bool) -> StepModel:
    return StepModel(
        overlaps_host=overlaps_host,
        host_step_ps=round(fitted.base_ms * _PS_PER_MS),
        host_sequence_ps=round(fitted.sequence_ms * _PS_PER_MS),
        weights_ps=round(fitted.weights_ms * _PS_PER_MS),
        token_ps=round(fitted.token_ms * _PS_PER_MS),
        context_ps=round(fitted.context_ms * _PS_PER_MS),
    )


def roofline(device: DeviceConfig, engine: EngineConfig, model: ModelConfig, attention: str | None) -> StepModel:
    """What memory and arithmetic of `model.tp` devices allow, at the engine's efficiencies.

    A token costs two operations per parameter; a (query, key) pair four per element of every query head.
    """
    host, cost = engine.host(model.tp), engine.attention_cost(attention)
    byte_ps = PS_PER_S / (device.need("bandwidth_gb_per_s") * 1e9 * model.tp)
    flop_ps = PS_PER_S / (device.need("tflop_per_s") * 1e12 * model.tp)
    pair_flops = 4 * model.num_heads * model.head_size * model.num_layers
    reads = model.num_heads // model.num_kv_heads if cost.reads_per_head else 1
    link_step_ps, link_token_ps = _all_reduces(device, model) if model.tp > 1 else (0, 0)
    return StepModel(
        overlaps_host=engine.overlaps_host,
        host_step_ps=round((host.step_us + cost.step_us) * _PS_PER_US),
        host_sequence_ps=round(host.sequence_us * _PS_PER_US),
        weights_ps=round(model.step_parameters() * DTYPE_BYTES[model.dtype] * byte_ps / engine.weights_efficiency),
        token_ps=round(2 * model.step_parameters() * flop_ps / engine.flop_efficiency),
        context_ps=round(model.kv_layout().token_bytes * reads * byte_ps / cost.read_efficiency),
        pair_ps=round(pair_flops * flop_ps / cost.flop_efficiency),
        link_step_ps=link_step_ps,
        link_token_ps=link_token_ps + round(model.num_layers * cost.append_ns * _PS_PER_US / 1000),
        launch_ps=round(model.num_layers * host.layer_us * _PS_PER_US),
    )


def _all_reduces(device: DeviceConfig, model: ModelConfig) -> tuple[int, int]:
    """Two all-reduces per layer (Megatron-LM): their latency per step, and a ring's traffic per token."""
    calls = 2 * model.num_layers
    token_bytes = calls * 2 * (model.tp - 1) / model.tp * model.hidden_size * DTYPE_BYTES[model.dtype]
    return (
        round(calls * device.need("allreduce_us") * _PS_PER_US),
        round(token_bytes * PS_PER_S / (device.need("nvlink_gb_per_s") * 1e9)),
    )
