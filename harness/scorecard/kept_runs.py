"""The runs that are kept: results/<device>/<experiment>/, with `-modelled` after the device of a modelled one."""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from kvarena.errors import UserError
from kvarena.harness.paths import RESULTS
from kvarena.harness.record.summary import COLUMNS
from kvarena.harness.run.published import OURS
from kvarena.harness.scorecard.expression import Point

LARGE_BYTES = 400_000  # a drawing beyond this weighs more than its pixels
_NOT_KEPT = ("runs", "published", "baselines")  # folders beside those of devices


class MissingPointError(LookupError):
    """A run has no such value, or several."""


@dataclass(frozen=True)
class KeptRun:
    """One finished run: its folder, its summary, and where its numbers come from."""

    folder: Path
    summary: pd.DataFrame
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """`<device>/<experiment>`, as the folders are called."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def experiment(self) -> str:
        """The experiment that ran."""
        return str(self.summary["experiment"].iloc[0])

    @property
    def clock(self) -> str:
        """measured, modelled, or both: a measured run may have modelled rows beside its own."""
        return " and ".join(sorted(set(self.summary["clock"].astype(str))))

    @property
    def devices(self) -> list[str]:
        """Devices of its numbers: measured ones, or those that were modelled."""
        return list(dict.fromkeys(self.summary["device"].astype(str)))

    @property
    def figure(self) -> Path | None:
        """Its picture: the drawing that scales, unless that is large, else the pixels."""
        drawing, pixels = self.folder / "figure.svg", self.folder / "figure.png"
        if drawing.is_file() and (drawing.stat().st_size <= LARGE_BYTES or not pixels.is_file()):
            return drawing
        return pixels if pixels.is_file() else None

    def row(self, paper: str, point: Point) -> pd.Series:
        """The one row that answers: earned, of a figure of the paper, else our own. Raises MissingPointError."""
        rows = self._rows.get((paper, *_key(point))) or self._rows.get((OURS, *_key(point)), [])
        if len(rows) != 1:
            raise MissingPointError(
                f"{'several values' if rows else 'no value'} of {paper} {' / '.join(map(str, point))}"
            )
        return self.summary.iloc[rows[0]]

    @cached_property
    def _rows(self) -> dict[tuple[str, ...], list[int]]:
        columns = (self.summary[name] for name in ("paper", "figure", "panel", "system", "quantity", "x"))
        rows: dict[tuple[str, ...], list[int]] = {}
        for number, (paper, *point) in enumerate(zip(*columns, strict=True)):
            rows.setdefault((str(paper), *_key(Point(*point))), []).append(number)
        return rows


class Published:
    """The published values, asked for as a run's are."""

    def __init__(self, table: pd.DataFrame) -> None:
        keys = zip(*(table[name] for name in ("paper", "figure", "panel", "system", "quantity", "x")), strict=True)
        self._values = {
            (str(paper), *_key(Point(*point))): float(value)
            for (paper, *point), value in zip(keys, table["value"], strict=True)
        }

    def value(self, paper: str, point: Point) -> float:
        """The published value. Raises MissingPointError."""
        try:
            return self._values[(paper, *_key(point))]
        except KeyError:
            raise MissingPointError(f"{paper} publishes no {_told(point)}") from None


def _told(point: Point) -> str:
    """A point in an error message."""
    *names, x = point
    return ", ".join(map(str, names)) + ("" if x is None else f" at {x:g}")


def _key(point: Point) -> tuple[str, ...]:
    """A point as it is compared: x to six digits, as summaries round it."""
    *names, x = point
    blank = x is None or pd.isna(x)
    return (*map(str, names), "" if blank else f"{float(x):.6g}")  # type: ignore[arg-type]


def load_run(folder: Path) -> KeptRun:
    """Read a finished run. Raises UserError where its files are not what they should be."""
    path = folder / "summary.csv"
    try:
        summary = pd.read_csv(path)
        record = folder / "provenance.json"
        provenance = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: cannot be read as a finished run: {error}") from error
    missing = [name for name in COLUMNS if name not in summary]
    if missing or summary.empty:
        raise UserError(f"{path}: {'lacks the columns ' + ', '.join(missing) if missing else 'has no rows'}")
    return KeptRun(folder, summary, provenance)


def kept_runs(results: Path = RESULTS) -> list[KeptRun]:
    """All of them, by device and experiment."""
    return [load_run(folder) for folder in kept_folders(results)]


def kept_folders(results: Path = RESULTS) -> list[Path]:
    """Their folders, by device and experiment."""
    folders = [path.parent for path in sorted(results.glob("*/*/summary.csv"))]
    return [folder for folder in folders if folder.parent.name not in _NOT_KEPT]
