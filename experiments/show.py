"""What a run prints: a table, the files, and the last line."""

from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from kvarena.harness.record import Outcome


def outcome(done: Outcome, folder: Path) -> None:
    """The headline quantity as systems x points, then where everything is."""
    console = Console()
    rows = done.summary[done.summary.quantity == done.headline]
    for (panel, unit), part in rows.groupby(["panel", "unit"], sort=False):
        console.print(_pivot(part, f"{panel}: {done.headline}, {unit} ({_evidence(part)})"))
    print(f"figure:  {folder / 'figure.png'}")
    print(f"frames:  {folder / 'summary.csv'}, requests.parquet, steps.parquet")
    print(f"results: {folder}")


def _evidence(rows: pd.DataFrame) -> str:
    """Clock and device of the numbers: a modelled one is never shown without that word."""
    return ", ".join(dict.fromkeys(f"{r.clock} on {r.device}" for r in rows.itertuples()))


def _pivot(rows: pd.DataFrame, title: str) -> Table:
    table = Table(title=title, title_justify="left")
    points = sorted(rows["x"].unique())
    table.add_column("system")
    for x in points:
        table.add_column(f"{x:g}", justify="right")
    for system, values in rows.groupby("system", sort=False):
        by_x = values.set_index("x")
        table.add_row(str(system), *(_cell(by_x.loc[x]) if x in by_x.index else "-" for x in points))
    return table


def _cell(row: pd.Series) -> str:
    """Median, and half the width of its 95 % interval."""
    value = f"{row['value']:.4g}"
    half = (row["ci_high"] - row["ci_low"]) / 2
    return f"{value} ±{half:.2g}" if half == half else value
