"""An experiment of the project as a case: run by the command line, in a process of its own, and kept."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from kvarena.experiments.gpu_validation.record import FailedError, NotRunError, Values
from kvarena.experiments.gpu_validation.step import Context
from kvarena.harness.paths import CONF


def finished(name: str, overrides: Sequence[str], context: Context, kept_as: str | None = None) -> Path:
    """Run `experiment=name`; the folder of the run, of which a copy is kept as runs/<kept_as>.

    Raises NotRunError where there is no such experiment or a package is missing, FailedError with its last line
    where it fails.
    """
    if not (CONF / "experiment" / f"{name}.yaml").is_file():
        raise NotRunError(f"there is no experiment {name}")
    home = context.scratch / "unsorted"
    command = [sys.executable, "-m", "kvarena", f"experiment={name}", f"device={context.device}", *overrides]
    done = subprocess.run(
        command,
        env={**os.environ, "KVARENA_RUNS": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout, flush=True)
    if done.returncode:
        complaint = _complaint(done.stdout) or f"ended with {done.returncode}"
        raise NotRunError(complaint) if complaint.startswith("ModuleNotFoundError") else FailedError(complaint)
    folder = (home / name / "latest").resolve()
    shutil.copytree(folder, context.scratch / "runs" / (kept_as or name), dirs_exist_ok=True)
    return folder


def medians(folder: Path, quantity: str) -> Values:
    """`<panel>, <system>, <x>` -> value of a quantity of the run's summary."""
    import pandas as pd

    rows = pd.read_csv(folder / "summary.csv")
    rows = rows[rows.quantity == quantity].fillna({"x": ""})
    named = zip(rows.panel, rows.system, rows.x, rows.value, strict=True)
    return {f"{panel} {system} {x}".strip(): float(f"{value:.4g}") for panel, system, x, value in named}


def _complaint(output: str) -> str:
    """The line that says what went wrong: the one that begins with "error", else the last."""
    lines = [line for line in output.strip().splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "")
