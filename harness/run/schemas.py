"""The dataclass behind every group of conf/: group -> (name in the group) -> schema."""

from collections.abc import Callable, Sequence
from typing import Any

from kvarena.harness.config import ALL, AUTO

_BY_NAME = ("allocator", "kernel", "scheduler")  # groups in which every name has a schema of its own


def of(group: str, name: str | None = None) -> type[Any]:  # another dataclass for each group and name
    """The schema of one choice of a group. Imports late: composing a configuration must not need torch.

    Raises UserError for a name that does not exist, ValueError for a group.
    """
    match group:
        case "allocator":
            from kvarena.allocators.registry import config_class as allocator_config

            return allocator_config(str(name))
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
            from kvarena.harness.trace.arrival import ArrivalConfig

            return ArrivalConfig
        case "decoding":
            from kvarena.harness.requests.decoding import DecodingConfig

            return DecodingConfig
        case "scheduler":
            from kvarena.harness.scheduler.registry import config_class as scheduler_config

            return scheduler_config(str(name))
        case "engine":
            from kvarena.harness.modelled.engine_config import EngineConfig

            return EngineConfig
        case "device":
            from kvarena.harness.modelled.device_model import DeviceConfig

            return DeviceConfig
    raise ValueError(group)


def schema_of(
    overrides: Sequence[str], params: Callable[[Sequence[str]], type | None]
) -> Callable[[str, str | None], type | None]:
    """Look-up of schemas for `check_overrides`; None where a choice stands for several, and `resolve` says more."""

    def look_up(group: str, name: str | None) -> type | None:
        if group == "params":
            return params(overrides)
        return None if name in (None, ALL, AUTO) and group in _BY_NAME else of(group, name)

    return look_up
