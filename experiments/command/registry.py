"""Experiments by name: the file conf/experiment/<name>.yaml, and the module that runs it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol, TypeVar, cast

import pandas as pd
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kvarena.errors import UserError
from kvarena.experiments.kit.beside import is_account, say_beside
from kvarena.harness.config import names
from kvarena.harness.record.record import Frames, Measured, Recorder
from kvarena.harness.record.summary import SummaryRow
from kvarena.harness.run.run import Run, resolve
from kvarena.harness.run.unread import check_read

PACKAGES = ("kvarena.experiments.pagedattention", "kvarena.experiments.vattention", "kvarena.experiments.ours")
# They run one of their systems in several ways: further systems would be refused, or left out.
ONE_SYSTEM = ("allocation_overlap", "calibrate", "deferred_reclamation", "preemption")


Q = TypeVar("Q")


class Experiment(Protocol[Q]):
    """What a module of these packages offers. `Q` is its Params."""

    Params: type[Q]  # dataclass of the experiment's own keys, `params.<key>`
    HEADLINE: str  # the quantity that the run prints
    READS: Mapping[str, Sequence[str]]  # clock -> groups of keys that it reads (harness/run/unread.py)

    def unread(self, run: Run[Q]) -> Mapping[str, str]:
        """Keys of those groups, and of `params`, that this run does not read: key -> what to write instead."""

    def measure(self, run: Run[Q], recorder: Recorder) -> Measured:
        """Measure every cell. Raises UserError for what cannot be measured."""

    def summarize(self, run: Run[Q], frames: Frames) -> Iterable[SummaryRow]:
        """The rows of `summary.csv`, from the frames alone: a finished run's make the same again."""

    def draw(self, summary: pd.DataFrame) -> Figure:
        """Draw the figure from `summary.csv` alone, so that a reader can redraw a committed run."""


def get(name: str) -> Experiment[object]:
    """The module of an experiment: for runs of its own Params. Raises UserError with the names that exist."""
    if name not in names("experiment"):
        raise UserError(f"experiment={name}: no such experiment. There are: {', '.join(names('experiment'))}")
    [package] = [each for each in PACKAGES if find_spec(f"{each}.{name}")]
    module = import_module(f"{package}.{name}")
    assert is_dataclass(module.Params), name
    return cast(Experiment[object], module)  # whose runs are made with its Params, in `resolved`


def named(overrides: Sequence[str]) -> str:
    """The experiment that the overrides name. Raises UserError where they name none, or several."""
    chosen = [o.split("=", 1)[1] for o in overrides if o.startswith("experiment=")]
    if not chosen:
        raise UserError(f"name an experiment: experiment=NAME. There are: {', '.join(names('experiment'))}")
    if "," in chosen[-1]:
        raise UserError(f"experiment={chosen[-1]}: a multirun sweeps the keys of one experiment")
    return chosen[-1]


def drawn(name: str, summary: pd.DataFrame) -> Figure:
    """The figure of an experiment's own rows, and beside it which requests it leaves out.

    No name in it is a formula.
    """
    literal = summary.map(lambda value: value.replace("$", r"\$") if isinstance(value, str) else value)
    figure = get(name).draw(own_rows(literal))
    say_beside(figure, literal)
    figure.draw_without_rendering()  # texts are laid out now: a fault in them must not wait until the figure is saved
    return figure


def own_rows(summary: pd.DataFrame) -> pd.DataFrame:
    """The rows of the experiment itself, without those that account for its traces, and for what was refused."""
    return summary[~is_account(summary)].reset_index(drop=True)


def resolved(config: DictConfig, overrides: Sequence[str]) -> Run[object]:
    """The run of a composed configuration. Raises UserError for what does not exist, does not fit or is not read."""
    try:
        OmegaConf.to_container(config, resolve=True)  # references to other keys, and to what is outside
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    module = get(config.name)
    run = resolve(config, overrides, module.Params, module.READS)
    check_read(run, module.unread(run))
    return run


def params_schema(overrides: Sequence[str]) -> type:
    """The dataclass of `params.*` of the experiment that the overrides name."""
    return get(named(overrides)).Params
