"""What serves a run's requests: the one place where it is put together."""

from kvarena.harness.model.config import ModelConfig
from kvarena.harness.modelled.device_model import DeviceConfig
from kvarena.harness.modelled.engine_config import EngineConfig
from kvarena.harness.modelled.roofline import step_model_of
from kvarena.harness.modelled.step_model import StepModel
from kvarena.harness.run.systems import System


def make_step_model(device: DeviceConfig, engine: EngineConfig, model: ModelConfig, system: System) -> StepModel:
    """The step model of `model` served by `engine` with a system's scheduler and kernel, as `step_model_of` says."""
    return step_model_of(device, engine, model, system.scheduler.name, system.attention_key)
