"""The models of `conf/model/`, by name."""

from typing import Any

from omegaconf import OmegaConf

from kvarena.errors import UserError
from kvarena.harness.config import load, names, typed
from kvarena.harness.model.config import ModelConfig

_STAND_INS = ("auto", "checkpoint")  # the device or a checkpoint decides what they are


def preset_names() -> list[str]:
    """Names of the models whose sizes stand in `conf/model/`."""
    return [name for name in names("model") if name not in _STAND_INS]


def load_preset(name: str, **changes: Any) -> ModelConfig:
    """Read `conf/model/<name>.yaml` and change some of its fields. Raises UserError for an unknown name or field."""
    if name not in preset_names():
        raise UserError(f"model={name}: no such model. There are: {', '.join(preset_names())}")
    config: ModelConfig = typed(ModelConfig, OmegaConf.merge(load("model", name), changes), "model")
    return config
