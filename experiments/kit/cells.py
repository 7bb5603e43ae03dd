"""The loop of every experiment: one cell after the other, and the tables of all of them together."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import pandas as pd

from kvarena.harness.record.progress import Progress
from kvarena.harness.record.record import Frames, Recorder


class Cell(NamedTuple):
    """One point with all its systems: what is measured in one go, and read back where an unfinished run had it."""

    key: str  # names it, in this run
    measure: Callable[[], Frames]
    columns: Mapping[str, str | float] = {}  # that every row of its tables gets: what tells the cell from the others


def run_cells(experiment: str, recorder: Recorder, cells: Sequence[Cell]) -> Frames:
    """The tables of all cells, by name, in the order of the cells."""
    tables: dict[str, list[pd.DataFrame]] = {}
    with Progress(experiment, len(cells)) as progress:
        for cell in cells:
            progress.stage(cell.key)
            for name, table in recorder.cell(cell.key, cell.measure).items():
                tables.setdefault(name, []).append(table.assign(**cell.columns))
            progress.advance()
    return {name: pd.concat(each, ignore_index=True) for name, each in tables.items()}
