"""The models of one published figure, each on as many devices as the paper ran it: one run of each."""

from dataclasses import replace

from kvarena.harness.model.config import ModelConfig
from kvarena.harness.model.presets import load_preset
from kvarena.harness.run import Run


def runs_by_model(run: Run) -> list[Run]:
    """The run with each model of `params.models` (name -> tensor-parallel degree), or with its own alone.

    The profile's model stands first in `params.models`; whoever names another model gets that one.
    """
    models: dict[str, int] = run.params.models
    if not models or _as_named(run.model) != load_preset(next(iter(models))):
        return [run]
    return [replace(run, model=load_preset(name, tp=tp)) for name, tp in models.items()]


def _as_named(model: ModelConfig) -> ModelConfig:
    return replace(model, tp=1)
