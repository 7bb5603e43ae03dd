"""The models of `conf/model/`: by name, and under which of the papers' names they may appear."""

from dataclasses import fields, replace
from typing import Any

from omegaconf import OmegaConf

from kvarena.errors import UserError
from kvarena.harness.model.config import ModelConfig
from kvarena.harness.paths import CONF

_NOT_A_SIZE = {"dtype", "seed", "checkpoint", "tp", "shard_only"}  # what a published model may change


def preset_names() -> list[str]:
    """Names of the presets; `auto`, which stands for one of them, is not among them."""
    return sorted(path.stem for path in (CONF / "model").glob("*.yaml") if path.stem not in ("auto", "checkpoint"))


def load_preset(name: str, **changes: Any) -> ModelConfig:
    """Read `conf/model/<name>.yaml` and change some of its fields. Raises UserError for an unknown name or key."""
    if name not in preset_names():
        raise UserError(f"model={name}: no such model; conf/model/ has: {', '.join(preset_names())}")
    known = {field.name for field in fields(ModelConfig)}
    if unknown := sorted(set(changes) - known):
        raise UserError(f"model.{unknown[0]}: no such key; a model has: {', '.join(sorted(known))}")
    preset = OmegaConf.load(CONF / "model" / f"{name}.yaml")
    return ModelConfig(**{str(key): value for key, value in preset.items()} | changes)


def panel_name(config: ModelConfig) -> str:
    """The papers' name for this model if its sizes are the published ones, else its own."""
    if config.published_panel is None or config.name not in preset_names():
        return config.name
    preset = load_preset(config.name)
    same_sizes = replace(config, **{key: getattr(preset, key) for key in _NOT_A_SIZE}) == preset
    return config.published_panel if same_sizes else config.name
