"""The models that fill the cache: Llama and OPT. What is imported here needs no torch, for the modelled clock."""

from kvarena.harness.model.config import ModelConfig
from kvarena.harness.model.presets import load_preset, preset_names

__all__ = ["ModelConfig", "load_preset", "preset_names"]
