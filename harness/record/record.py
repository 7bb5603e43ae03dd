"""What a run writes, all of it or nothing.

    results/runs/<experiment>/<time>-<hash>/   a finished run
    results/runs/<experiment>/latest           link to the last finished one
    results/runs/<experiment>/.unfinished/     cells of runs that have not ended, one folder per identity

A cell is one point with all its systems. Finished cells of an unfinished run are read back, so that a killed run is
continued by the same command; once the run has ended, its cells are gone and the next command measures again. A cell
holds what it told of its traces and refusals: one that is read back tells the same as when it was measured. Of two
equal commands at once the second waits for the first.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from io import BytesIO
from pathlib import Path
from traceback import extract_tb
from typing import Any

import matplotlib as mpl
import pandas as pd
from omegaconf import OmegaConf

from kvarena.errors import UserError
from kvarena.harness.accounts import told
from kvarena.harness.files.content import check_unchanged
from kvarena.harness.paths import RESULTS
from kvarena.harness.record.provenance import identity, provenance
from kvarena.harness.record.turn import Turn
from kvarena.harness.record.writing import beside, explained, whole_folder, write_whole

Frames = dict[str, pd.DataFrame]
_TOLD = "told.json"  # of a cell's traces, and of what its systems refused
ADVICE = "Free some space or set KVARENA_RUNS to a folder that can be written."


@dataclass
class Measured:
    """What an experiment has measured. Nothing is made of it yet."""

    frames: Frames  # name -> table, written as <name>.parquet: named for what it holds
    notes: dict[str, Any] = field(default_factory=dict)  # goes into provenance.json: calibration, trace, counts
    files: dict[str, str] = field(default_factory=dict)  # name -> text, written beside the others


@dataclass
class Outcome:
    """All that a run writes: what was measured, and what was made of it."""

    measured: Measured
    summary: pd.DataFrame  # harness/record/summary.py
    headline: str  # the quantity to print
    figure: Any = None  # matplotlib figure


def runs_folder() -> Path:
    """Where runs are written: results/runs, or what KVARENA_RUNS names. Raises UserError where it names nothing."""
    named = os.environ.get("KVARENA_RUNS", str(RESULTS / "runs"))
    if not named.strip():
        raise UserError("KVARENA_RUNS is set and empty: name a folder, or unset it for results/runs")
    try:
        return Path(named).expanduser().absolute()
    except RuntimeError as error:
        raise UserError(f"KVARENA_RUNS={named}: {error}") from error


class Recorder:
    """Keeps the cells of one run and writes its folder: under its own name, or as one job of a sweep."""

    def __init__(self, experiment: str, config: dict[str, Any], job: Path | None = None) -> None:
        self._config = config
        self._home = runs_folder() / experiment
        self._job = job
        self._hash = identity(config)
        # Cells of a job lie in its sweep's folder and go with it, whenever the job was killed.
        self._unfinished = (self._home if job is None else job.parent) / ".unfinished" / self._hash
        self._kept = self._unfinished.with_name(f"{self._hash}-measured")
        with explained(self._home, ADVICE):
            self._unfinished.mkdir(parents=True, exist_ok=True)
            self._turn = Turn(self._unfinished.with_name(f"{self._hash}.lock"), f"into {self._home}")
            self._unfinished.mkdir(exist_ok=True)  # whom we waited for has taken it away
            _probe(self._unfinished)
        self._read_back = _left(self._unfinished)
        if self._read_back:
            print(_said(self._read_back), file=sys.stderr, flush=True)

    def cell(self, key: str, measure: Callable[[], Frames]) -> Frames:
        """Frames of one cell: measured now, or read back where an unfinished run had measured it."""
        folder = self._unfinished / key
        if not folder.is_dir():
            with told.heard() as facts:
                frames = measure()
            check_unchanged(self._config.get("files", {}))
            self._store(folder, frames, facts)
        told.tell_again(json.loads((folder / _TOLD).read_text(encoding="utf-8")))
        return read_frames(folder)

    def _store(self, folder: Path, frames: Frames, facts: Sequence[told.Fact]) -> None:
        with explained(folder, ADVICE), suppress(FileExistsError), whole_folder(folder) as partial:
            for name, table in frames.items():
                table.to_parquet(partial / f"{name}.parquet")
            (partial / _TOLD).write_text(json.dumps(told.as_plain(facts), default=int), encoding="utf-8")

    def keep(self, measured: Measured) -> Path:
        """Keep what was measured of a run whose summary or figure failed; its cells stay too. Returns the folder."""
        shutil.rmtree(self._kept, ignore_errors=True)
        with explained(self._kept, ADVICE), whole_folder(self._kept) as partial:
            write_measured(partial, self._told(measured), self._config)
        return self._kept

    def finish(self, outcome: Outcome) -> Path:
        """Write the run's folder, and forget its cells and what an earlier try kept. Returns the folder.

        A figure that cannot be rendered is left out, which is said.
        """
        self._told(outcome.measured)
        with explained(self._home, ADVICE):
            if self._job is None:
                folder = publish(self._home, self._hash, lambda partial: write_outcome(partial, outcome, self._config))
            else:
                folder = self._job
                with whole_folder(folder) as partial:
                    write_outcome(partial, outcome, self._config)
        for left in (self._unfinished, self._kept):
            shutil.rmtree(left, ignore_errors=True)
        self._turn.end()
        return folder

    def _told(self, measured: Measured) -> Measured:
        """What was measured, saying which of its cells an earlier command had measured, and when."""
        if self._read_back:
            measured.notes["read_back"] = self._read_back
        return measured


def publish(home: Path, name: str, write: Callable[[Path], None]) -> Path:
    """Write a finished run as <home>/<time>-<name> and point `latest` at it. Returns the folder."""
    target = home / f"{datetime.now():%Y%m%d-%H%M%S}-{name}"
    while target.exists():  # a second run within the same second
        target = target.with_name(target.name + "-again")
    with whole_folder(target) as partial:
        write(partial)
    _point(home / "latest", target.name)
    return target


def write_outcome(folder: Path, outcome: Outcome, config: dict[str, Any]) -> None:
    """Write the files of a finished run into an existing folder: without its figure where that cannot be rendered."""
    write_measured(folder, outcome.measured, config)
    try:
        write_summary(folder, outcome)
    except OSError:
        raise
    except Exception as error:
        say_undrawn(error)
        write_summary(folder, replace(outcome, figure=None))


def say_undrawn(error: Exception) -> None:
    """What to say of a figure whose drawing failed."""
    what = (str(error).strip().splitlines() or [""])[0]
    at = extract_tb(error.__traceback__)[-1]
    where = f"{type(error).__name__} at {at.filename}:{at.lineno}"
    print(f"the figure cannot be drawn, and all else is written. {where}: {what}", file=sys.stderr)


def write_measured(folder: Path, measured: Measured, config: dict[str, Any]) -> None:
    """Write what was measured, and where it comes from. Raises ValueError for a frame without rows."""
    for name, table in measured.frames.items():
        if table.empty:
            raise ValueError(f"the frame {name} has no rows: a run that has none leaves it out")
        table.to_parquet(folder / f"{name}.parquet", index=False)
    record = provenance(config, **measured.notes)
    (folder / "provenance.json").write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)), encoding="utf-8")
    for name, text in measured.files.items():
        (folder / name).write_text(text, encoding="utf-8")


def write_summary(folder: Path, outcome: Outcome) -> None:
    """Write, or replace, what was made of it, the summary and the figure, once all of it is rendered."""
    files = {"summary.csv": outcome.summary.to_csv(index=False).encode()}
    if outcome.figure is not None:
        with mpl.rc_context({"svg.hashsalt": "kvarena"}):  # the same figure, the same bytes
            files["figure.png"] = _rendered(outcome.figure, format="png", dpi=150)
            files["figure.svg"] = _rendered(outcome.figure, format="svg", metadata={"Date": None})
    for name, content in files.items():
        write_whole(folder / name, content)


def _rendered(figure: Any, **how: Any) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, bbox_inches="tight", **how)
    return buffer.getvalue()


def read_frames(folder: Path) -> Frames:
    """The frames of a run's folder, by name."""
    return {path.stem: pd.read_parquet(path) for path in sorted(folder.glob("*.parquet"))}


def _probe(folder: Path) -> None:
    """Fail before the measurement, not after it, where the folder cannot be written."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-") as probe:
        probe.write(bytes(4096))
        probe.flush()
        os.fsync(probe.fileno())


def _left(folder: Path) -> dict[str, str]:
    """Cells that an unfinished run has left, and when it had measured each, the oldest first."""
    cells = [cell for cell in folder.iterdir() if not cell.name.startswith(".")]
    times = sorted((cell.stat().st_mtime, cell.name) for cell in cells)
    return {name: datetime.fromtimestamp(time).isoformat(timespec="seconds") for time, name in times}


def _said(left: Mapping[str, str]) -> str:
    """One line on cells that are not measured again."""
    first, *_, last = [*left.values(), *left.values()]
    return f"read back from an unfinished run of {first} to {last}: {len(left)} cells, {', '.join(left)}"


def _point(link: Path, target: str) -> None:
    """Replace a link in one step: a reader finds the old target or the new, never none.

    Where no link can be made (some file systems know none) that is said: the run itself is written.
    """
    fresh = beside(link)
    try:
        fresh.symlink_to(target)
        fresh.replace(link)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        print(f"{link}: cannot be made to point at {target}: {error.strerror}", file=sys.stderr)
