"""The models of `conf/model/`: by name, and under which of the papers' names they may appear."""

from dataclasses import replace
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from kvarena.errors import UserError
from kvarena.harness.config import load, names, typed
from kvarena.harness.model.config import ModelConfig

_STAND_INS = ("auto", "checkpoint")  # the device or a checkpoint decides what they are
_NOT_SIZES = ("dtype", "seed", "checkpoint", "tp", "shard_only")  # what a published model may change


def preset_names() -> list[str]:
    """Names of the models whose sizes stand in `conf/model/`."""
    return [name for name in names("model") if name not in _STAND_INS]


def load_preset(name: str, **changes: Any) -> ModelConfig:
    """Read `conf/model/<name>.yaml` and change some of its fields. Raises UserError for an unknown name or field."""
    if name not in preset_names():
        raise UserError(f"model={name}: no such model. There are: {', '.join(preset_names())}")
    config: ModelConfig = typed(ModelConfig, OmegaConf.merge(load("model", name), changes), "model")
    return config


def panel_name(config: ModelConfig) -> str:
    """The papers' name for this model if its sizes are the published ones, else its own: `panel` of a record."""
    if config.published_panel is None or config.name not in preset_names():
        return config.name
    preset = _as_published(config.name)
    as_published = replace(config, **{key: getattr(preset, key) for key in _NOT_SIZES})
    return config.published_panel if as_published == preset else config.name


@cache  # asked for every row of a summary; nobody changes what it returns
def _as_published(name: str) -> ModelConfig:
    return load_preset(name)
