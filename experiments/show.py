"""What a run prints: a table, the files, and the last line."""

from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from kvarena.harness.record import Outcome

MAX_COLUMNS = 9  # that a terminal of usual width can hold


def outcome(done: Outcome, folder: Path) -> None:
    """The headline quantity as systems x points (or x its kinds, `quantity:kind`), then where everything is."""
    console = Console()
    rows = done.summary[done.summary.quantity.str.partition(":")[0] == done.headline]
    for (panel, unit), part in rows.groupby(["panel", "unit"], sort=False):
        console.print(_pivot(part, f"{panel}: {done.headline}, {unit} ({_evidence(part)})"))
    print(f"figure:  {folder / 'figure.png'}")
    print(f"frames:  {', '.join([str(folder / 'summary.csv'), *(f'{name}.parquet' for name in done.measured.frames)])}")
    print(f"results: {folder}")


def _evidence(rows: pd.DataFrame) -> str:
    """Clock and device of the numbers: a modelled one is never shown without that word."""
    return ", ".join(dict.fromkeys(f"{r.clock} on {r.device}" for r in rows.itertuples()))


def _pivot(rows: pd.DataFrame, title: str) -> Table:
    table = Table(title=title, title_justify="left")
    named = [_point(float(x), str(quantity)) for x, quantity in zip(rows["x"], rows["quantity"], strict=True)]
    rows = rows.assign(point=named)
    points = list(dict.fromkeys(rows.sort_values("x", kind="stable")["point"]))
    systems = list(dict.fromkeys(rows["system"]))
    cells = {(r["system"], r["point"]): _cell(r) for _, r in rows.iterrows()}
    wide = len(points) > MAX_COLUMNS  # then points go down and systems across
    heads, lines = (systems, points) if wide else (points, systems)
    table.add_column("" if wide else "system")
    for head in heads:
        table.add_column(head, justify="right")
    for line in lines:
        table.add_row(line, *(cells.get((head, line) if wide else (line, head), "-") for head in heads))
    return table


def _point(x: float, quantity: str) -> str:
    """What heads a column: x where there is one, else the kind, else the quantity itself."""
    return f"{x:g}" if x == x else (quantity.partition(":")[2] or quantity).replace("_", " ")


def _cell(row: pd.Series) -> str:
    """Median, and half the width of its 95 % interval."""
    value = f"{row['value']:.4g}"
    half = (row["ci_high"] - row["ci_low"]) / 2
    return f"{value} ±{half:.2g}" if half == half else value
