"""How much K/V a decoding batch writes per second (vAttention Fig 4), from a device model."""

from collections.abc import Iterator, Sequence
from typing import Any

from kvarena.allocators.sizes import MB
from kvarena.errors import UserError
from kvarena.harness import schemas
from kvarena.harness.config import load, typed
from kvarena.harness.device_model import DeviceConfig
from kvarena.harness.engine_config import EngineConfig
from kvarena.harness.model import panel_name
from kvarena.harness.model.config import ModelConfig
from kvarena.harness.model.presets import load_preset
from kvarena.harness.roofline import step_model_of
from kvarena.harness.step_model import PS_PER_S, StepLoad
from kvarena.harness.summary import SummaryRow, row

TP = {"yi-6b": 1, "llama-3-8b": 2, "yi-34b": 2}  # GPUs of each model in the paper's Table 5
PAPERS_SYSTEM = "FA2_Paged"  # whose decode throughput Fig 4 shows; it depends little on the allocator
ATTENTION = "fa2/paged"  # its kernel, for engines that tell kernels apart


def decode_need(
    models: Sequence[str], device: str, engine: EngineConfig, batches: Sequence[int], context: int
) -> Iterator[SummaryRow]:
    """Tokens/s of every model and batch, and MB/s (2^20) of K/V: one token of every sequence a step, over all GPUs.

    Raises UserError for a model or device that does not exist, or is no device model.
    """
    hardware: DeviceConfig = typed(schemas.of("device", device), load("device", device), "params.need_device")
    if hardware.kind != "modelled":
        raise UserError(f"params.need_device={device}: not a device model, see conf/device/")
    for name in models:
        model = load_preset(name, tp=TP.get(name, 1))
        for batch in batches:
            tokens_per_s = _decode_throughput(hardware, engine, model, batch, context)
            rate = tokens_per_s * model.kv_layout().token_bytes / MB
            for quantity, value, unit in (
                ("decode_throughput_vs_batch", tokens_per_s, "token/s"),
                ("kv_allocation_rate_vs_batch", rate, "MB/s"),
            ):
                yield row(value, quantity=quantity, unit=unit, x=batch, **_columns(model, device, engine))


def _decode_throughput(
    hardware: DeviceConfig, engine: EngineConfig, model: ModelConfig, batch: int, context: int
) -> float:
    step = step_model_of(hardware, engine, model, "vllm", ATTENTION)
    return batch * PS_PER_S / step.step_ps(StepLoad(batch, batch, batch * context))


def _columns(model: ModelConfig, device: str, engine: EngineConfig) -> dict[str, Any]:
    return {
        "experiment": "allocation_bandwidth", "paper": "vattention", "figure": "fig4", "panel": panel_name(model),
        "system": PAPERS_SYSTEM, "allocator": "paged", "kernel": engine.name, "model": model.name,
        "clock": "modelled", "device": device, "evidence": "predicted",
    }  # fmt: skip
