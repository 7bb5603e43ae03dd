"""The models of one published figure, each on as many devices as the paper ran it: one run of each."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import pandas as pd

from kvarena.harness.model.presets import load_preset
from kvarena.harness.run.run import P, Run


def runs_by_model(run: Run[P], listed: Mapping[str, int]) -> list[Run[P]]:
    """The run with each model that is listed (name -> devices that share it); under the measured clock as it is.

    Whoever names a model gets that one alone, on as many devices as are listed for it unless `model.tp` says.
    """
    if run.clock == "measured" or not listed:
        return [run]
    if "model" in run.given:
        tp = run.model.tp if "model.tp" in run.given else listed.get(run.model.name, run.model.tp)
        return [replace(run, model=replace(run.model, tp=tp))]
    return [replace(run, model=load_preset(name, tp=tp)) for name, tp in listed.items()]


def unread_models(run: Run[object], listed: Mapping[str, int], key: str = "models") -> dict[str, str]:
    """`params.<key>`, which lists models, where it is not what chooses; and what does."""
    if run.clock == "measured":
        keys = {f"params.{key}": "clock=measured runs one model: model=NAME"}
        if run.model.tp == 1:
            keys["model.shard_only"] = "one device runs all of the model; model.tp sets how many share it"
        return keys
    if "model" in run.given:
        return {f"params.{key}": f"model={run.model.name} is run alone; model.tp sets on how many devices"}
    if listed:
        fields = [each for each in run.given if each.startswith("model.")]
        return {
            each: f"params.{key} lists the models; model=NAME runs one alone, with its fields set" for each in fields
        }
    return {}


def model_columns(run: Run[object]) -> dict[str, str | int]:
    """The columns by which `by_model` takes a table apart."""
    return {"model": run.model.name, "tp": run.model.tp}


def of_model(run: Run[object], table: pd.DataFrame) -> pd.DataFrame:
    """A table with those columns."""
    return table.assign(**model_columns(run))


def by_model(run: Run[P], table: pd.DataFrame) -> Iterator[tuple[Run[P], pd.DataFrame]]:
    """The run of each model in a table of finished measurements, and that model's rows."""
    for (name, tp), rows in table.groupby(["model", "tp"], sort=False):
        model = run.model if run.model.name == name else load_preset(str(name))
        yield replace(run, model=replace(model, tp=int(str(tp)))), rows
