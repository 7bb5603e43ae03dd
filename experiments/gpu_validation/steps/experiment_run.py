"""An experiment of the project as a case: as the command line runs it, in this process, and kept."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from kvarena.errors import UserError
from kvarena.experiments.gpu_validation.record import FailedError, Values
from kvarena.experiments.gpu_validation.step import Context
from kvarena.kernels.threads import set_compute_threads


def finished(name: str, overrides: Sequence[str], context: Context, kept_as: str | None = None) -> Path:
    """Run `experiment=name`; the folder of the run, kept as runs/<kept_as>.

    Its cells are kept as they end: of a run that is killed they stay under runs/unfinished, and the same case goes on
    from there. Raises FailedError with what the command line would say where it cannot be run.
    """
    from kvarena.experiments.command.carry_out import carry_out
    from kvarena.experiments.command.compose import compose_run
    from kvarena.harness.record.record import Recorder

    os.environ["KVARENA_RUNS"] = str(context.scratch / "runs" / "unfinished")
    try:
        run = compose_run(f"experiment={name}", f"device={context.device}", *overrides)
        set_compute_threads(run.threads)
        recorder = Recorder(run.experiment, run.plain())
        outcome = carry_out(run, recorder)
        folder = recorder.finish(outcome)
    except UserError as error:
        raise FailedError(str(error)) from error
    kept = context.scratch / "runs" / (kept_as or name)
    shutil.rmtree(kept, ignore_errors=True)
    return folder.rename(kept)


def files_of(experiment: str) -> list[str]:
    """What a run of it uses, as a step's `uses` tells it."""
    from kvarena.experiments.command.registry import get

    groups = ("config.yaml", "systems.yaml", "base", "model", "scheduler", "engine", "trace", "arrival", "decoding")
    conf = [f"conf/{group}" for group in (*groups, f"experiment/{experiment}.yaml")]
    return [str(vars(get(experiment))["__name__"]), "kvarena.experiments.command.carry_out", "allocators", *conf]


def medians(folder: Path, quantity: str) -> Values:
    """`<panel>, <system>, <x>` -> value of a quantity of the run's summary."""
    import pandas as pd

    rows = pd.read_csv(folder / "summary.csv")
    rows = rows[rows.quantity == quantity].fillna({"x": ""})
    named = zip(rows.panel, rows.system, rows.x, rows.value, strict=True)
    return {f"{panel} {system} {x}".strip(): float(f"{value:.4g}") for panel, system, x, value in named}
