"""How each line of a panel looks, and the published points beside the lines that earned their names."""

from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes

from kvarena.experiments.kit import plots
from kvarena.harness.record.summary import published_values
from kvarena.harness.run.published import OURS

PAPER = "vattention"


class Look(NamedTuple):
    """One line: no two of a panel share both colour and dash, or both colour and marker."""

    name: str
    colour: str
    dash: str
    marker: str


def looks(rows: pd.DataFrame) -> dict[str, Look]:
    """label -> look: a published system has its paper's colour, and its line is drawn through where others are not."""
    names, colours, found = plots.shown_names(rows), plots.colours_of(rows.allocator), dict[str, Look]()
    first = rows.assign(own=rows.paper == OURS).sort_values("own", kind="stable").drop_duplicates("label")
    for label, system, allocator, own in zip(first.label, first.system, first.allocator, first.own, strict=True):
        colour = colours[allocator] if own else plots.PAPER_COLOURS.get(system, colours[allocator])
        number = sum(look.colour == colour for look in found.values()) + (own and not first.own.all())
        dash, marker = plots.DASHES[number % len(plots.DASHES)], plots.MARKERS[number % len(plots.MARKERS)]
        found[label] = Look(names[label], colour, dash, marker)
    return found


def lines(axis: Axes, rows: pd.DataFrame) -> None:
    """Value over x, a line for each label, with its 95 % interval as a band where there is one."""
    for label, look in looks(rows).items():
        line = rows[rows.label == label].sort_values("x")
        axis.plot(line.x, line.value, look.dash, color=look.colour, marker=look.marker, ms=4, label=look.name)
        if line.ci_low.notna().any():
            low, high = line.ci_low.astype(float), line.ci_high.astype(float)
            axis.fill_between(line.x, low, high, color=look.colour, alpha=0.15, lw=0)


def dots(axis: Axes, rows: pd.DataFrame, theirs: pd.DataFrame) -> None:
    """The published points of the lines that earned their names, in the colours of those."""
    for label, look in looks(rows).items():
        points = published_of(rows[rows.label == label], theirs)
        if len(points):
            axis.plot(points.x, points.value, look.marker, ms=7, mfc="none", color=look.colour)


def published_of(rows: pd.DataFrame, theirs: pd.DataFrame) -> pd.DataFrame:
    """The published points whose panels and systems some of the rows earned."""
    earned = rows.loc[rows.paper != OURS, ["figure", "panel", "system"]].drop_duplicates()
    return theirs.merge(earned, on=["figure", "panel", "system"])


def title(axis: Axes, rows: pd.DataFrame, figure: str | None, ours: str) -> None:
    """The published panel where some of the rows earned it, else our words; below what ran, and by which clock."""
    earned = rows[(rows.figure == figure) & (rows.paper != OURS)]
    what = ours
    if len(earned):
        first = earned.iloc[0]
        theirs = published_values(PAPER, figure=first.figure, panel=first.panel)
        what = f"vAttention {str(figure).replace('fig', 'Fig ')}: {first.panel}" + (
            "; published beside" if len(theirs) else ""
        )
    axis.set_title(f"{what}\n{rows.setup.iloc[0]}, {rows.clock.iloc[0]}", fontsize=9)
