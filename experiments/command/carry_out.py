"""A run from its configuration to its folder: measured first, then summarised and drawn.

What was measured is never lost to a fault in what is made of it. Where no summary can be made it is kept; where no
figure can be drawn the run is finished without. `./run.sh summarize FOLDER` makes both with the code as it is then.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from kvarena.errors import UserError
from kvarena.experiments.command import registry
from kvarena.harness.accounts import replays, told
from kvarena.harness.accounts.refusals import QUANTITIES, by_system, quantities
from kvarena.harness.files.content import check_unchanged
from kvarena.harness.record.record import (
    ADVICE,
    Frames,
    Measured,
    Outcome,
    Recorder,
    read_frames,
    say_undrawn,
    write_summary,
)
from kvarena.harness.record.summary import SummaryRow, frame, row
from kvarena.harness.record.writing import explained
from kvarena.harness.run.published import named
from kvarena.harness.run.run import Run, from_plain

TRACES = "traces"  # the frame that says what became of each trace: records read, dropped, served
REFUSALS = "refusals"  # the frame that says how many requests each system refused


def carry_out(run: Run[object], recorder: Recorder) -> Outcome:
    """Measure, summarise, and draw where that can be done."""
    measured = measure(run, recorder)
    try:
        summary = summary_of(run, measured.frames)
    except Exception:
        folder = recorder.keep(measured)
        print(
            f"What was measured is kept: {folder}\nThe same command goes on from there; where the code has to be "
            f"mended, ./run.sh summarize {folder} then makes the summary and the figure.",
            file=sys.stderr,
        )
        raise
    return Outcome(measured, summary, registry.get(run.experiment).HEADLINE, drawn_if_possible(run.experiment, summary))


def measure(run: Run[object], recorder: Recorder) -> Measured:
    """What the experiment measures, with an account of every trace that it told of, and of what systems refused."""
    with told.heard() as facts:
        measured = registry.get(run.experiment).measure(run, recorder)
    check_unchanged(run.files)
    if accounts := told.accounts(facts):
        traces = replays.by_trace(accounts)
        measured.notes["traces"] = [replays.said(each) for each in traces]
        measured.frames[TRACES] = pd.DataFrame(
            {"trace": f"{number}: {each[0].name}, {each[0].source}", "quantity": name, "value": value, "unit": unit}
            for number, each in enumerate(traces, start=1)
            for name, (value, unit) in replays.quantities(each).items()
        )
    if refused := list(by_system(told.refusals(facts))):
        measured.notes["refusals"] = [str(own[0]) for own in refused if own[0].refused]
        measured.frames[REFUSALS] = pd.DataFrame(asdict(own[0]) | quantities(own) for own in refused)
    return measured


def summary_of(run: Run[object], frames: Frames) -> pd.DataFrame:
    """The experiment's summary, and under it what became of its traces: each of them alone, and system by system."""
    summary = frame(registry.get(run.experiment).summarize(run, frames))
    parts = [summary, frame(_of_traces(run, frames)), frame(_of_refusals(run, frames))]
    return pd.concat([part for part in parts if len(part)], ignore_index=True)


def _of_traces(run: Run[object], frames: Frames) -> Iterator[SummaryRow]:
    """The account of each trace, whatever serves it."""
    for each in frames[TRACES].to_dict("records") if TRACES in frames else ():
        label, source = f"{replays.ACCOUNT}{each['trace']}", each["trace"].partition(": ")[2]
        names = named(replace(run, reads=()), label=label, detail=source, counted=True)
        yield row(each["value"], quantity=each["quantity"], unit=each["unit"], **names)


def _of_refusals(run: Run[object], frames: Frames) -> Iterator[SummaryRow]:
    """What each system refused, none too."""
    for each in frames[REFUSALS].to_dict("records") if REFUSALS in frames else ():
        names = named(run, label=each["label"], counted=True)
        names["setup"] = names["panel"] = each["setup"]
        names["allocator"], names["kernel"], names["model"] = each["allocator"], each["kernel"], each["model"]
        for quantity in QUANTITIES:
            if pd.notna(each.get(quantity)):
                yield row(each[quantity], quantity=quantity, unit="requests", **names)


def made_of(run: Run[object], measured: Measured) -> Outcome:
    """Summary and figure of what was measured."""
    summary = summary_of(run, measured.frames)
    return Outcome(measured, summary, registry.get(run.experiment).HEADLINE, registry.drawn(run.experiment, summary))


def drawn_if_possible(experiment: str, summary: pd.DataFrame) -> Figure | None:
    """The figure of a summary; None where drawing fails, which is said: the tables do not wait for it."""
    try:
        return registry.drawn(experiment, summary)
    except Exception as error:
        say_undrawn(error)
        return None


def resolved_in(folder: Path) -> Run[object]:
    """The run that a folder was written by. Raises UserError where there is none, or there are several."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder}: holds no config.yaml, so it is not the folder of a run")
    try:
        config = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not isinstance(config, dict) or "experiment" not in config:
        several = " but of a multirun, which has those of its runs in jobs/" if (folder / "jobs").is_dir() else ""
        raise UserError(f"{folder}: is not the folder of a run{several}")
    module = registry.get(str(config["experiment"]))
    if config.get("clock") not in module.READS:
        raise UserError(f"{path}: clock {config.get('clock')!r} is none of {', '.join(module.READS)}")
    try:
        run = from_plain({str(key): value for key, value in config.items()}, module.Params, module.READS)
    except KeyError as error:
        raise UserError(f"{path}: lacks {error}: it is not what a run wrote") from error
    return replace(run, gpu=_gpu_of(folder))


def _gpu_of(folder: Path) -> str | None:
    """The GPU that a folder's run was measured on, whatever there is here; None where there was none."""
    record = folder / "provenance.json"
    try:
        machine = json.loads(record.read_text(encoding="utf-8")).get("machine") or {} if record.is_file() else {}
    except ValueError as error:
        raise UserError(f"{record}: cannot be read: {error}") from error
    gpu: str | None = machine.get("gpu")
    return gpu


class _Frames(dict[str, pd.DataFrame]):
    """The frames of a folder; one that is asked for and missing is the user's to find."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            super().__init__(read_frames(folder))
        except (ValueError, OSError) as error:  # what pyarrow raises for a file that is no Parquet, or half of one
            raise UserError(f"{folder}: a frame cannot be read: {error}") from error

    def __missing__(self, name: str) -> pd.DataFrame:
        raise UserError(f"{self._folder}: {name}.parquet is missing, and the summary is made of it")


def summarize(folder: Path) -> Outcome:
    """Make summary and figure of the frames of a folder, with today's code. Raises UserError for what is no run."""
    run, frames = resolved_in(folder), _Frames(folder)
    if not frames:
        raise UserError(f"{folder}: holds no frames (*.parquet) to make a summary of")
    outcome = made_of(run, Measured(frames))
    with explained(folder, ADVICE):
        write_summary(folder, outcome)
    return outcome
