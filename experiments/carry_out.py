"""A run from its configuration to its folder: measured first, then summarised and drawn.

What was measured is never lost to a fault in what is made of it: it is kept, and `./run.sh summarize FOLDER` makes
summary and figure of it with the code as it is then.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from omegaconf import OmegaConf

from kvarena.errors import UserError
from kvarena.experiments import registry
from kvarena.harness.record import Measured, Outcome, Recorder, read_frames, write_summary
from kvarena.harness.run import Run, from_plain


def carry_out(run: Run, recorder: Recorder) -> Outcome:
    """Measure, summarise and draw."""
    measured = registry.get(run.experiment).measure(run, recorder)
    try:
        return made_of(run, measured)
    except Exception:
        folder = recorder.keep(measured)
        print(
            f"What was measured is kept: {folder}\nThe same command goes on from there; where the code has to be "
            f"mended, ./run.sh summarize {folder} then makes the summary and the figure.",
            file=sys.stderr,
        )
        raise


def made_of(run: Run, measured: Measured) -> Outcome:
    """Summary and figure of what was measured."""
    module = registry.get(run.experiment)
    summary = module.summarize(run, measured.frames)
    return Outcome(measured, summary, module.HEADLINE, module.draw(summary))


def resolved_in(folder: Path) -> Run:
    """The run that a folder was written by. Raises UserError where there is none."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder}: holds no config.yaml, so it is not the folder of a run")
    config = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(config, dict)
    if "experiment" not in config:
        raise UserError(f"{folder}: is a whole sweep; take one of its jobs, {folder}/jobs/*")
    module = registry.get(str(config["experiment"]))
    run = from_plain({str(key): value for key, value in config.items()}, module.Params, module.READS)
    return replace(run, gpu=_gpu_of(folder))


def _gpu_of(folder: Path) -> str | None:
    """The GPU that a folder's run was measured on, whatever there is here; None where there was none."""
    record = folder / "provenance.json"
    machine = json.loads(record.read_text(encoding="utf-8")).get("machine") or {} if record.is_file() else {}
    gpu: str | None = machine.get("gpu")
    return gpu


def summarize(folder: Path) -> Outcome:
    """Make summary and figure of the frames of a folder, with today's code. Raises UserError for what is no run."""
    outcome = made_of(resolved_in(folder), Measured(read_frames(folder)))
    write_summary(folder, outcome)
    return outcome
