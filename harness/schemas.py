"""The dataclass behind every group of conf/: group -> (name in the group) -> schema."""

from kvarena.harness.config import ALL, AUTO


def of(group: str, name: str | None = None) -> type:
    """The schema of one choice of a group. Imports late: composing a configuration must not need torch."""
    match group:
        case "allocator":
            from kvarena.allocators.registry import config_class

            return config_class(str(name))
        case "kernel":
            from kvarena.kernels.config import KernelConfig

            return KernelConfig
        case "model":
            from kvarena.harness.model import ModelConfig

            return ModelConfig
        case "trace":
            from kvarena.harness.trace.config import TraceConfig

            return TraceConfig
        case "arrival":
            from kvarena.harness.arrival import ArrivalConfig

            return ArrivalConfig
        case "scheduler":
            from kvarena.harness.scheduler.registry import config_class as scheduler_config

            return scheduler_config(str(name))
        case "engine":
            from kvarena.harness.engine_config import EngineConfig

            return EngineConfig
        case "device":
            from kvarena.harness.device_model import DeviceConfig

            return DeviceConfig
    raise ValueError(group)


def is_open(name: str | None) -> bool:
    """Whether a choice stands for several, so that it has no fields of its own."""
    return name in (None, ALL, AUTO)
