"""Experiments by name: the file conf/experiment/<name>.yaml, and the module that runs it."""

import importlib
from dataclasses import is_dataclass
from typing import Protocol, cast

import pandas as pd
from matplotlib.figure import Figure

from kvarena.errors import UserError
from kvarena.harness.config import names
from kvarena.harness.record import Outcome, Recorder
from kvarena.harness.run import Run


class Experiment(Protocol):
    """What a module of this package offers."""

    Params: type  # dataclass of the experiment's own keys, `params.<key>`
    HEADLINE: str  # the quantity that the run prints

    def run(self, run: Run, recorder: Recorder) -> Outcome:
        """Measure every cell and return what is to be written."""

    def draw(self, summary: pd.DataFrame) -> Figure:
        """Draw the figure from `summary.csv` alone, so that a reader can redraw a committed run."""


def get(name: str) -> Experiment:
    """The module of an experiment. Raises UserError with the names that exist."""
    if name not in names("experiment"):
        raise UserError(f"experiment={name}: no such experiment. There are: {', '.join(names('experiment'))}")
    module = importlib.import_module(f"kvarena.experiments.{name}")
    assert is_dataclass(module.Params), name
    return cast(Experiment, module)
