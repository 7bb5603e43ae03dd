"""What an experiment says of its samples, as data: each quantity is one line, and gives one row of `summary.csv`."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

import pandas as pd

from kvarena.harness.record.statistics import Estimate, median_interval
from kvarena.harness.record.summary import Names, SummaryRow, row

Taken = pd.Series | Estimate | float  # samples, of which the median is shown, or what has been made of them


class Quantity(NamedTuple):
    """A number that is taken of samples."""

    name: str
    unit: str
    of: str | Callable[[pd.DataFrame], Taken]  # the column that has it, or what is made of the columns
    figure: str | None = None  # that has it, in one of the papers; None: it is ours
    counted: bool = False  # arithmetic or a count


def columns(units: Mapping[str, str], suffix: str = "") -> list[Quantity]:
    """A quantity for each column, called as it is, and the suffix; `units` by column."""
    return [Quantity(f"{name}{suffix}", unit, name) for name, unit in units.items()]


class Naming(Protocol):
    """`harness/run/published.py: named` with everything given but what a quantity says itself."""

    def __call__(self, figure: str | None = None, *, counted: bool = False) -> Names:
        """Columns of a row of our own, or of the figure's quantity."""


def rows(quantities: Iterable[Quantity], samples: pd.DataFrame, names: Naming) -> Iterator[SummaryRow]:
    """A row for each quantity that some of the samples have: the median over them."""
    for name, unit, of, figure, counted in quantities:
        taken = samples[of] if isinstance(of, str) else of(samples)
        if isinstance(taken, pd.Series):
            taken = taken.dropna()
            if taken.empty:
                continue
            taken = median_interval(taken)
        yield row(taken, quantity=name, unit=unit, **names(figure, counted=counted))
