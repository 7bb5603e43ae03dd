"""A multirun: each job writes its folder, and when the last has ended all become one.

    results/runs/<experiment>/.unfinished/sweep-<hash>/job-<hash>/   finished jobs of a sweep that has not ended
    results/runs/<experiment>/.unfinished/sweep-<hash>/.asked/       what this command asks for: of each job, its folder
    results/runs/<experiment>/<time>-<hash>/                         the whole sweep: aggregated files, and jobs/<job>/

A sweep whose jobs are all one run (`multirun.py`) leaves the folder of that run. The same command continues a sweep
that was killed: jobs that had ended are not run again, unless their files hold something else by now.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from kvarena.errors import UserError
from kvarena.experiments.command import registry
from kvarena.experiments.command.carry_out import drawn_if_possible
from kvarena.experiments.command.multirun import SEEDS
from kvarena.experiments.command.over_seeds import over_seeds
from kvarena.experiments.command.paths import parsed
from kvarena.harness.record.provenance import identity
from kvarena.harness.record.record import (
    ADVICE,
    Frames,
    Measured,
    Outcome,
    publish,
    read_frames,
    runs_folder,
    write_outcome,
)
from kvarena.harness.record.summary import COLUMNS, KEY
from kvarena.harness.record.turn import Turn
from kvarena.harness.record.writing import explained, write_whole
from kvarena.harness.run.published import OURS
from kvarena.harness.run.run import Plain

APART = (
    "The jobs ran one after the other: under clock=measured compare the systems within a job, not one job with another."
)
_VARIABLE = "KVARENA_SWEEP"  # inherited by the worker processes of Hydra's launchers
_PLAN = ".plan.json"
_ASKED = ".asked"


class Sweep:
    """One multirun of one experiment, as the process that starts it sees it."""

    def __init__(self, experiment: str, arguments: list[str], within: Sequence[Sequence[str]] = ()) -> None:
        """within: overrides of the runs that may be one, in each of Hydra's jobs."""
        self._experiment, self._arguments = experiment, arguments
        self._name = f"sweep-{identity({'arguments': arguments})}"
        self._home = runs_folder() / experiment
        self._folder = self._home / ".unfinished" / self._name
        plan = {"command": ["-m", *arguments], "within": list(map(list, within))}
        with explained(self._folder, ADVICE):
            self._folder.parent.mkdir(parents=True, exist_ok=True)
            self._turn = Turn(self._folder.with_name(f"{self._name}.lock"), f"into {self._home}")
            shutil.rmtree(self._folder / _ASKED, ignore_errors=True)
            (self._folder / _ASKED).mkdir(parents=True)
            write_whole(self._folder / _PLAN, json.dumps(plan))
        os.environ[_VARIABLE] = str(self._folder)

    def finish(self) -> tuple[Path, Outcome]:
        """Make one folder of all jobs. Returns it, and what it says."""
        asked = self._asked()
        jobs = list(asked)
        configs = [OmegaConf.to_container(OmegaConf.load(job / "config.yaml")) for job in jobs]
        outcome = self._only(jobs[0]) if len(jobs) == 1 else self._aggregate(asked, configs)

        def write(partial: Path) -> None:
            if len(jobs) == 1:
                shutil.copytree(jobs[0], partial, dirs_exist_ok=True)
                return
            names = [f"{number:0{len(str(len(jobs)))}}-{job.name}" for number, job in enumerate(jobs, start=1)]
            named = dict(zip(names, configs, strict=True))
            write_outcome(partial, outcome, {"arguments": self._arguments, "jobs": named})
            for name, job in zip(names, jobs, strict=True):
                shutil.copytree(job, partial / "jobs" / name)

        with explained(self._home, ADVICE):
            target = publish(self._home, self._name, write)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._turn.end()
        return target, outcome

    def _asked(self) -> dict[Path, list[str]]:
        """The folder of each job, in the order asked for, and its overrides; of equal jobs those of the first."""
        asked = dict[Path, list[str]]()
        for mark in sorted((self._folder / _ASKED).iterdir()):
            job = json.loads(mark.read_text(encoding="utf-8"))
            asked.setdefault(self._folder / job["folder"], job["overrides"])
        return asked

    def _only(self, job: Path) -> Outcome:
        headline = registry.get(self._experiment).HEADLINE
        return Outcome(Measured({}), pd.read_csv(job / "summary.csv"), headline)

    def _aggregate(self, asked: dict[Path, list[str]], configs: list[Any]) -> Outcome:  # as YAML has them
        check_same_files(configs)
        jobs, overrides = list(asked), list(asked.values())
        labels = differing([[o for o in each if _key(o) not in SEEDS] for each in overrides])
        alike = {label: [job for job, own in zip(jobs, labels, strict=True) if own == label] for label in labels}
        tables = {label: over_seeds([pd.read_csv(job / "summary.csv") for job in of]) for label, of in alike.items()}
        summary = _once(pd.concat([_labelled(table, label) for label, table in tables.items()], ignore_index=True))
        timed = len(tables) > 1 and any(config["clock"] == "measured" for config in configs)
        measured = Measured(_frames(jobs, differing(overrides)), {"remark": APART} if timed else {})
        module = registry.get(self._experiment)
        return Outcome(measured, summary, module.HEADLINE, drawn_if_possible(self._experiment, summary))


def within() -> list[list[str]]:
    """Overrides of the runs of this job that may be one; none outside a sweep."""
    return list(_plan().get("within", []))


def job_folder(config: Plain) -> Path | None:
    """Where a job of this resolved configuration writes; None outside a sweep."""
    home = os.environ.get(_VARIABLE)
    if home is None:
        return None
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()
    return Path(home) / f"job-{digest[:12]}"


def note(job: Path, overrides: Sequence[str], place: Sequence[int]) -> None:
    """Note a job that has ended, now or before. place: Hydra's number of it, and that of the run within it."""
    mark = job.parent / _ASKED / "-".join(f"{number:09}" for number in place)
    write_whole(mark, json.dumps({"folder": job.name, "overrides": list(overrides)}))


def check_same_files(configs: Sequence[Plain]) -> None:
    """Raises UserError where jobs have read a file that held something else for each: that is no comparison."""
    held = dict[str, str]()
    for config in configs:
        for path, content in config.get("files", {}).items():
            if held.setdefault(path, content) != content:
                raise UserError(
                    f"{path}: was changed while the sweep ran, so that its jobs have read different contents. The same "
                    "command measures again what the file was changed for"
                )


def notes(overrides: Sequence[str]) -> dict[str, object]:
    """What a job's provenance says: its own overrides, and the command of its sweep."""
    return {"job": list(overrides), "command": _plan()["command"]}


def _plan() -> Plain:
    home = os.environ.get(_VARIABLE)
    return {} if home is None else dict(json.loads((Path(home) / _PLAN).read_text(encoding="utf-8")))


def differing(jobs: Sequence[Sequence[str]]) -> list[str]:
    """For each job, those of its overrides that not all have: "trace.seed=1"."""
    return [", ".join(_words(o) for o in own if not all(o in other for other in jobs)) for own in jobs]


def _words(override: str) -> str:
    """An override without the quotes that Hydra wants around a text."""
    [read] = parsed([override])
    value = read.value()
    return f"{read.get_key_element()}={value}" if isinstance(value, str) else override


def _key(override: str) -> str:
    return override.lstrip("+").partition("=")[0]


def _labelled(summary: pd.DataFrame, label: str) -> pd.DataFrame:
    """Rows that say what was swept; those that earned a published name keep it."""
    if not label:
        return summary
    said = f" [{label}]"
    own = summary.system.where(summary.paper != OURS, summary.system + said)
    return summary.assign(system=own, label=summary.label + said)[COLUMNS]


def _once(summary: pd.DataFrame) -> pd.DataFrame:
    """A published name that rows of several jobs earned is nobody's: then they are ours."""
    twice = summary.duplicated(KEY, keep=False) & (summary.paper != OURS)
    ours = {"paper": OURS, "figure": summary.experiment, "panel": summary.setup, "system": summary.label}
    return summary.assign(**{column: summary[column].mask(twice, name) for column, name in ours.items()})


def _frames(jobs: Sequence[Path], labels: Sequence[str]) -> Frames:
    """The frames of all jobs, by name; the column `job` says of which a row is."""
    tables: dict[str, list[pd.DataFrame]] = {}
    for job, label in zip(jobs, labels, strict=True):
        for name, table in read_frames(job).items():
            tables.setdefault(name, []).append(table.assign(job=label))
    return {name: pd.concat(each, ignore_index=True) for name, each in tables.items()}
