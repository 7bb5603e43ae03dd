"""A multirun: each job writes its folder, and when the last has ended all become one.

    results/runs/<experiment>/.unfinished/sweep-<hash>/<job>/   finished jobs of a sweep that has not ended
    results/runs/<experiment>/<time>-<hash>/                    the whole sweep: aggregated files, and jobs/<job>/

The same command continues a sweep that was killed: jobs that had ended are not run again.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from kvarena.experiments import registry
from kvarena.harness.provenance import identity
from kvarena.harness.published import OURS
from kvarena.harness.record import ADVICE, Measured, Outcome, publish, read_frames, runs_folder, write_outcome
from kvarena.harness.summary import COLUMNS
from kvarena.harness.writing import explained

_VARIABLE = "KVARENA_SWEEP"  # inherited by the worker processes of Hydra's launchers


class Sweep:
    """One multirun of one experiment, as the process that starts it sees it."""

    def __init__(self, experiment: str, arguments: list[str]) -> None:
        self._experiment, self._arguments = experiment, arguments
        self._name = f"sweep-{identity({'arguments': arguments})}"
        self._home = runs_folder() / experiment
        self._folder = self._home / ".unfinished" / self._name
        with explained(self._folder, ADVICE):
            self._folder.mkdir(parents=True, exist_ok=True)
        os.environ[_VARIABLE] = str(self._folder)

    def finish(self) -> tuple[Path, Outcome]:
        """Make one folder of all jobs. Returns it, and what it says."""
        jobs = sorted(path.parent for path in self._folder.glob("job-*/summary.csv"))
        configs = [OmegaConf.to_container(OmegaConf.load(job / "config.yaml")) for job in jobs]
        outcome = self._aggregate(jobs, configs)

        def write(partial: Path) -> None:
            write_outcome(
                partial,
                outcome,
                {
                    "arguments": self._arguments,
                    "jobs": {job.name: config for job, config in zip(jobs, configs, strict=True)},
                },
            )
            shutil.copytree(self._folder, partial / "jobs", ignore=shutil.ignore_patterns(".*"))

        with explained(self._home, ADVICE):
            target = publish(self._home, self._name, write)
        shutil.rmtree(self._folder, ignore_errors=True)
        return target, outcome

    def _aggregate(self, jobs: list[Path], configs: list[Any]) -> Outcome:
        labels = swept_labels(configs)
        summary = pd.concat(
            [_labelled(pd.read_csv(job / "summary.csv"), label) for job, label in zip(jobs, labels, strict=True)],
            ignore_index=True,
        )[COLUMNS]
        tables: dict[str, list[pd.DataFrame]] = {}
        for job, label in zip(jobs, labels, strict=True):
            for name, table in read_frames(job).items():
                tables.setdefault(name, []).append(table.assign(job=label))
        frames = {name: pd.concat(each, ignore_index=True) for name, each in tables.items()}
        module = registry.get(self._experiment)
        return Outcome(Measured(frames), summary, module.HEADLINE, module.draw(summary))


def job_folder(config: dict[str, Any]) -> Path | None:
    """Where a job of this resolved configuration writes; None outside a sweep."""
    home = os.environ.get(_VARIABLE)
    if home is None:
        return None
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()
    return Path(home) / f"job-{digest[:12]}"


def swept_labels(configs: list[Any]) -> list[str]:
    """For each job, the values of the keys in which the jobs differ: "allocator.block_size=32"."""
    # What a sweep sets of an allocator stands in every system that uses it: named once is enough.
    flat = [{re.sub(r"^systems\.\d+\.", "", k): v for k, v in _flatten(config).items()} for config in configs]
    keys = dict.fromkeys(key for values in flat for key in values)
    differing = [key for key in keys if len({repr(values.get(key)) for values in flat}) > 1]
    return [", ".join(f"{key}={values[key]}" for key in differing if key in values) for values in flat]


def _flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
    if items is None:
        return {prefix: node}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _labelled(summary: pd.DataFrame, label: str) -> pd.DataFrame:
    """Rows that say what was swept, so that their keys stay unique; those that earned a published name keep it."""
    told = {name: summary[name] + f" [{label}]" for name in ("system", "label")}
    return summary.assign(**told | {"system": told["system"].where(summary["paper"] == OURS, summary["system"])})
