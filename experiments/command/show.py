"""What a run prints: its tables, what kind of numbers they are, the files, and the last line."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console

from kvarena.experiments.command.streams import say
from kvarena.experiments.kit.beside import said_beside
from kvarena.experiments.kit.legend import shown
from kvarena.experiments.kit.tables import Grid, print_grid
from kvarena.harness.record.record import Outcome
from kvarena.harness.run.published import OURS

NARROW = 40  # columns; in fewer no number would be in one piece


def outcome(done: Outcome, folder: Path) -> None:
    """What was found, then where everything is, whatever becomes of the rest."""
    try:
        _found(done)
        figure = folder / "figure.png"
        print(f"figure:  {figure if figure.is_file() else 'none: it could not be drawn'}")
        print(f"frames:  {folder / 'summary.csv'}, {', '.join(sorted(path.name for path in folder.glob('*.parquet')))}")
    finally:
        say(f"results: {folder}")


def _found(done: Outcome) -> None:
    """The headline quantity as systems x points (or x its kinds, `quantity:kind`), and the kinds of its numbers."""
    console = Console()
    if console.width < NARROW:
        console = Console(width=NARROW)
    kinds = done.summary.quantity.str.split(":").str[0]
    rows = done.summary[kinds == done.headline]
    for _, part in rows.groupby(["paper", "figure", "panel", "unit"], sort=False):
        _print(console, part, done.headline)
    if said := said_beside(done.summary):
        print(said)
    if rows.empty:
        print(f"no rows of {done.headline}; the summary has {_listed(kinds) or 'none at all'}")
    print(_kinds_of(done.summary))
    if remark := done.measured.notes.get("remark"):
        print(remark)


def _print(console: Console, rows: pd.DataFrame, headline: str) -> None:
    """One table: of a published panel that rows earned, or of our own."""
    first = rows.iloc[0]
    stands = "" if first.paper == OURS else f"as {first.paper} {first.figure}, "
    unit = "" if first.unit == headline else f", {first.unit}"
    points = [_point(float(x), str(quantity)) for x, quantity in zip(rows["x"], rows["quantity"], strict=True)]
    rows = rows.assign(point=points, shown=_names(rows))
    cells = {(r["shown"], r["point"]): _cell(r) for _, r in rows.iterrows()}
    heads = list(dict.fromkeys(rows.sort_values("x", kind="stable")["point"]))
    title = f"{stands}{first.panel}: {headline}{unit} ({_samples(rows)}{_where(rows)})"
    print_grid(console, title, Grid("system", list(dict.fromkeys(rows["shown"])), heads, cells))


def _names(rows: pd.DataFrame) -> list[str]:
    """What each row is called; with what ran, where one name stands for several."""
    ran = rows.groupby("system").label.nunique()
    return [
        shown(system, paper) + (f" ({label})" if ran[system] > 1 else "")
        for system, paper, label in zip(rows.system, rows.paper, rows.label, strict=True)
    ]


def _point(x: float, quantity: str) -> str:
    """What heads a column: x where there is one, else the kind, else the quantity itself."""
    return f"{x:g}" if x == x else (quantity.partition(":")[2] or quantity).replace("_", " ")


def _cell(row: pd.Series) -> str:
    """Median, and half the width of its 95 % interval."""
    value = f"{row['value']:.4g}"
    half = (row["ci_high"] - row["ci_low"]) / 2
    return f"{value}±{np.format_float_positional(half, 2, fractional=False, trim='-')}" if half == half else value


def _samples(rows: pd.DataFrame) -> str:
    """What a cell is, where it is not one number."""
    few, many = int(rows["n"].min()), int(rows["n"].max())
    if many == 1:
        return ""
    interval = ", ± half of the 95 % interval" if rows["ci_low"].notna().any() else ""
    return f"medians of {many if few == many else f'{few} to {many}'}{interval}; "


def _where(rows: pd.DataFrame) -> str:
    """Clock and device of the numbers: a modelled one is never shown without that word."""
    return ", ".join(dict.fromkeys(f"{r.clock} on {r.device}" for r in rows.itertuples()))


def _kinds_of(summary: pd.DataFrame) -> str:
    """Kinds of evidence, clocks and devices of all rows, counted."""
    return "; ".join(f"{column}: {_listed(summary[column])}" for column in ("evidence", "clock", "device"))


def _listed(values: Iterable[object]) -> str:
    """Each value, and how many rows have it where there are several."""
    counts = pd.Series(list(values), dtype=object).value_counts(sort=False)
    return ", ".join(str(value) if len(counts) == 1 else f"{value} ({count})" for value, count in counts.items())
