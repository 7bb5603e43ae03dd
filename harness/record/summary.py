"""`summary.csv`: one schema for every experiment, so that ours and the published values join in one line of pandas."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import TypedDict, Unpack

import pandas as pd

from kvarena.harness.paths import PUBLISHED
from kvarena.harness.record.statistics import Estimate

CLOCKS = ("measured", "modelled")


class Evidence(StrEnum):
    """What kind of number a row is; `run/published.py` decides."""

    EXACT = "exact"  # counted, or arithmetic
    MEASURED = "measured"  # the wall clock, around real kernels
    CONDITIONAL = "conditional"  # modelled, and rests on an assumption that is stated
    CALIBRATED = "calibrated"  # modelled, and this published point is one that a constant was fitted to
    PREDICTED = "predicted"  # modelled otherwise


@dataclass(frozen=True, slots=True, kw_only=True)
class SummaryRow:
    """One number. `paper` ... `x` are those of `results/published/` where the row earned them (`run/published.py`).

    A row of our own has `paper=kvarena`, the experiment as its figure, `setup` as its panel and `label` as its system.
    Rows that earned a published name have both too: what ran, whatever it is called. `x` is blank (None) or a number.
    """

    experiment: str
    paper: str
    figure: str
    panel: str
    system: str
    setup: str  # model, trace, devices
    label: str  # <allocator>/<kernel>
    allocator: str
    kernel: str
    model: str
    quantity: str
    x: float | None
    value: float
    unit: str
    n: int
    ci_low: float
    ci_high: float
    clock: str
    device: str
    evidence: str

    def __post_init__(self) -> None:
        if self.evidence not in list(Evidence) or self.clock not in CLOCKS:
            raise ValueError(f"evidence {self.evidence!r} or clock {self.clock!r} is not of {[*Evidence]}, {CLOCKS}")


class Names(TypedDict):
    """The columns that say what a row is: all but its quantity and what it came to (`run/published.py`)."""

    experiment: str
    paper: str
    figure: str
    panel: str
    system: str
    setup: str
    label: str
    allocator: str
    kernel: str
    model: str
    x: float | None
    clock: str
    device: str
    evidence: str


COLUMNS = [field.name for field in fields(SummaryRow)]
KEY = ["paper", "figure", "panel", "system", "allocator", "kernel", "model", "quantity", "x", "clock", "device"]
PUBLISHED_KEY = ["paper", "figure", "panel", "system", "quantity", "x"]


def row(estimate: Estimate | float, *, quantity: str, unit: str, **names: Unpack[Names]) -> SummaryRow:
    """A row from an estimate, or from one exact number (n = 1, no interval)."""
    if not isinstance(estimate, Estimate):
        estimate = Estimate(float(estimate), 1, float("nan"), float("nan"))
    x = names["x"]
    names["x"] = None if x is None else float(f"{float(x):.6g}")
    return SummaryRow(
        quantity=quantity,
        value=estimate.median,
        unit=unit,
        n=estimate.n,
        ci_low=estimate.ci_low,
        ci_high=estimate.ci_high,
        **names,
    )


def frame(rows: Iterable[SummaryRow]) -> pd.DataFrame:
    """Rows as a frame with the schema's columns. Raises ValueError where two rows share a key."""
    table = pd.DataFrame([asdict(r) for r in rows], columns=COLUMNS).astype({"x": float, "value": float})
    twice = table[table.duplicated(KEY, keep=False)]
    if len(twice):
        raise ValueError(f"two summary rows share a key:\n{twice[KEY].head(4).to_string()}")
    return table


def read_published(folder: Path) -> pd.DataFrame:
    """The published values of both papers: columns paper, figure, panel, system, quantity, x, value, unit, reading."""
    table = pd.concat([pd.read_csv(path) for path in sorted(folder.glob("*_figures.csv"))], ignore_index=True)
    table["x"] = pd.to_numeric(table["x"], errors="coerce").map(lambda x: float(f"{x:.6g}"))  # as `row` rounds ours
    return table


@cache
def published() -> pd.DataFrame:
    """What this project knows of both papers' values, as `read_published` gives it."""
    return read_published(PUBLISHED)


def published_values(paper: str, **chosen: str) -> pd.DataFrame:
    """What a paper published, as `read_published` gives it; `figure="fig8"` keeps the rows of that figure."""
    table = published()
    kept = table.paper == paper
    for column, value in chosen.items():
        kept &= table[column] == value
    return table[kept]


def beside_published(summary: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """Our rows with the published value beside them (NaN where the papers have none)."""
    theirs = published[[*PUBLISHED_KEY, "value"]].rename(columns={"value": "published"})
    return summary.merge(theirs, on=PUBLISHED_KEY, how="left")
