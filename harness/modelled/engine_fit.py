"""Where an engine holds: constants fitted on one device, model or scheduler say nothing of another."""

from kvarena.errors import UserError
from kvarena.harness.config import changed, load, names, typed
from kvarena.harness.model.config import ModelConfig
from kvarena.harness.modelled.device_model import DeviceConfig
from kvarena.harness.modelled.engine_config import EngineConfig


def check_engine(engine: EngineConfig, device: DeviceConfig, model: ModelConfig, scheduler: str) -> None:
    """Raises UserError, with the engines that can, where the engine was fitted on something else."""
    reason = misfit(engine, device, model, scheduler)
    if reason is not None:
        engines: list[EngineConfig] = [typed(EngineConfig, load("engine", name), "engine") for name in names("engine")]
        able = [each.name for each in engines if misfit(each, device, model, scheduler) is None]
        raise UserError(f"engine={engine.name} {reason}. Engines that can: {', '.join(able)}")


def misfit(engine: EngineConfig, device: DeviceConfig, model: ModelConfig, scheduler: str) -> str | None:
    """Why the engine says nothing of this, None where it does."""
    if engine.devices and device.name not in engine.devices:
        return f"was fitted on {', '.join(engine.devices)}; this is {device.name}"
    if (engine.devices or engine.fitted) and (others := [key for key in changed(device, "device") if key in _LIMITS]):
        return f"was fitted on {device.name} as conf/device has it; this one has another {', '.join(others)}"
    if engine.schedulers and scheduler not in engine.schedulers:
        return f"was fitted under scheduler {', '.join(engine.schedulers)}; this is {scheduler}"
    if engine.models and model.name not in engine.models:
        return f"speaks of model {', '.join(engine.models)}; this is {model.name}"
    if engine.hosts and model.tp not in engine.hosts:
        return f"knows the host's work for model.tp={', '.join(map(str, engine.hosts))}; this is {model.tp}"
    if engine.fitted and (reason := _no_constants(engine, device, model, scheduler)) is not None:
        return reason
    if (engine.models or engine.fitted) and (others := list(changed(model, "model", _NO_SIZES))):
        return f"has constants of {model.name} as conf/model has it; this one has another {', '.join(others)}"
    return None


def _no_constants(engine: EngineConfig, device: DeviceConfig, model: ModelConfig, scheduler: str) -> str | None:
    step = engine.constants(model.name, scheduler)
    if step is None:
        there = ", ".join(sorted(engine.fitted))
        return f"has no constants for model={model.name} under scheduler={scheduler}. There are: {there}"
    if step.device is not None and (device.name, model.tp) != (step.device, step.tp):
        return f"has constants of {model.name} on {step.tp} x {step.device}; this is {model.tp} x {device.name}"
    return None


_LIMITS = ("bandwidth_gb_per_s", "tflop_per_s", "nvlink_gb_per_s", "allreduce_us")  # what a step's time depends on
_NO_SIZES = ("tp", "seed", "checkpoint", "shard_only", "max_tokens")
