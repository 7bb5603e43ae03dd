"""Panels of a figure, each drawn of the rows of its quantities, with the published points of those that stand for them.

    curves    value over x, a line for each label; across all of x where a label has none
    ratio     curves around 1
    bars      a bar for each label; one for each kind of the quantity (`name:kind`) side by side
    grouped   bars of all setups together, one for each setup side by side
    stacked   a bar for each label, made of the kinds

Beside rows over seeds there may be one of seed 0 alone, which has earned a published name: both are drawn.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from textwrap import fill
from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from kvarena.experiments.kit.looks import Look, looks, preferring_earned
from kvarena.experiments.kit.plots import LEAF_COLOURS, canvas
from kvarena.harness.record.summary import published
from kvarena.harness.run.published import OURS

PAPERS = {"pagedattention": "PagedAttention", "vattention": "vAttention"}
ROOM = 45  # characters of the names that stand side by side below bars; longer ones are turned
MANY = 16  # bars beside each other have no room for their values
GREY = "#BBBBBB"  # of published bars
PALER = ("#0072B2", "#56B4E9", "#A6D5F0", "#D5ECF8")  # of kinds side by side


class Panel(NamedTuple):
    """Some quantities, drawn once for each setup, or for all of them together."""

    shape: Callable[[Axes, pd.DataFrame], None]
    quantity: str  # regular expression of their names
    y: str
    x: str = ""
    what: str = ""  # heads it where it stands for nothing published
    doubling: bool = False  # x is drawn in powers of two
    legend: bool = True
    by_setup: bool = True

    def of(self, summary: pd.DataFrame) -> list[pd.DataFrame]:
        """Its rows, setup by setup."""
        rows = summary[summary.quantity.str.fullmatch(self.quantity)]
        if self.by_setup or rows.empty:
            return [each for _, each in rows.groupby("setup", sort=False)]
        return [rows]

    def draw(self, axis: Axes, rows: pd.DataFrame) -> None:
        """Draw some of its rows."""
        self.shape(axis, rows)
        axis.set_ylabel(self.y)
        if self.x:
            axis.set_xlabel(self.x)
        if self.doubling:
            doubling(axis, rows.x)
        if not axis.get_title():
            title(axis, rows if self.by_setup else rows.assign(setup=rows.device), self.what)
        if self.legend and axis.get_legend() is None and axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7, frameon=False)


def drawn(
    summary: pd.DataFrame, panels: Sequence[Panel], width: float = 5, height: float = 3.6, one_legend: bool = False
) -> Figure:
    """A figure of all panels; several panels of several setups have a column for each setup.

    one_legend: below, in place of those in the panels.
    """
    parts = [(panel, rows) for panel in panels for rows in panel.of(summary)]
    setups, count = max((len(panel.of(summary)) for panel in panels), default=1), max(1, len(parts))
    columns = setups if 1 < setups <= 4 and count % setups == 0 else -(-count // -(-count // 4))  # four at most
    figure, axes = canvas(-(-count // columns), columns, width, height)
    for axis, (panel, rows) in zip(axes, parts, strict=False):
        panel.draw(axis, rows)
    for axis in axes[len(parts) :]:
        axis.set_visible(False)
    figure.tight_layout()
    if one_legend:
        _legend_below(figure)
    return figure


def _legend_below(figure: Figure) -> None:
    axes = [axis for axis in figure.axes if axis.get_visible()]
    handles = {label: each for axis in axes for each, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    columns = max(1, round(figure.get_figwidth() / 2.5))
    inches = 0.1 + 0.2 * -(-len(handles) // columns)
    figure.set_figheight(figure.get_figheight() + inches)
    figure.tight_layout(rect=(0, inches / figure.get_figheight(), 1, 1))
    figure.legend(handles.values(), handles, fontsize=8, frameon=False, loc="lower center", ncols=columns)


def curves(axis: Axes, rows: pd.DataFrame, more: Mapping[str, str] | None = None) -> None:
    """Lines with their 95 % interval as a band; seed 0 alone is thin. `more` of a label is said behind its name."""
    theirs = published_of(rows)
    for label, look in looks(rows).items():
        line, alone = over_seeds(rows[rows.label == label].sort_values("x"))
        name, rings = f"{look.name}{(more or {}).get(label, '')}", theirs[theirs.label == label]
        if line.x.isna().all():
            axis.axhline(line.value.iloc[0], ls=look.dash, color=look.colour, lw=1, label=name)
            continue
        axis.plot(line.x, line.value, look.dash, color=look.colour, marker=look.marker, ms=4, lw=1.3, label=name)
        axis.fill_between(line.x, line.ci_low, line.ci_high, color=look.colour, alpha=0.15, lw=0)
        axis.plot(alone.x, alone.value, color=look.colour, lw=0.5)
        axis.plot(rings.x, rings.value, look.marker, ms=7, mfc="none", color=look.colour)
    if len(theirs):
        axis.plot([], [], "o", mfc="none", color="black", ls="none", label="published")
    if axis.get_yscale() == "linear":
        axis.set_ylim(0, None)


def ratio(axis: Axes, rows: pd.DataFrame) -> None:
    """Curves, and the line where both are alike."""
    curves(axis, rows)
    axis.axhline(1, color="black", lw=0.8)
    axis.set_ylim(0, max(1.25, axis.get_ylim()[1]))


def bars(axis: Axes, rows: pd.DataFrame, plain: str = "ours") -> None:
    """Bars in the colours of their allocators, or of their kinds where there are several; `plain` names that without.

    Published ones are grey, and a cross is seed 0 alone.
    """
    shown, (main, alone), theirs = looks(rows), over_seeds(rows), published_of(rows)
    kinds = list(dict.fromkeys(main.quantity))
    pieces = [main[main.quantity == kind] for kind in kinds] + ([theirs] if len(theirs) else [])
    width = 0.8 / len(pieces)
    for number, piece in enumerate(pieces):
        at = piece.label.map(_places(shown, pieces, number, width))
        if number == len(kinds):
            axis.bar(at, piece.value, width, color=GREY, label="published")
        elif len(kinds) > 1:
            said = kinds[number].partition(":")[2].replace("_", " ") or plain
            axis.bar(at, piece.value, width, color=PALER[number % len(PALER)], label=said)
        else:
            axis.bar(at, piece.value, width, color=[shown[label].colour for label in piece.label])
        _values(axis, at, piece)
    if len(alone):
        at = alone.label.map(_places(shown, pieces, 0, width))
        axis.plot(at, alone.value, "x", color="black", ms=4, label="seed 0 alone")
    name_bars(axis, shown)
    axis.margins(y=0.12)


def grouped(axis: Axes, rows: pd.DataFrame) -> None:
    """Bars of each label, in a colour for each setup; a line across is published."""
    shown, parts = looks(rows), [part for _, part in rows.groupby("setup", sort=False)]
    width = 0.8 / len(parts)
    for number, part in enumerate(parts):
        places = {label: place + width * (number + 0.5) - 0.4 for place, label in enumerate(shown)}
        theirs = published_of(part)
        axis.bar(part.label.map(places), part.value, width, label=part.setup.iloc[0].partition(",")[0])
        if len(rows) <= MANY:
            _values(axis, part.label.map(places), part)
        for at, value in zip(theirs.label.map(places), theirs.value, strict=True):
            axis.hlines(value, at - width / 2, at + width / 2, color="black", ls="--", label="published")
    name_bars(axis, shown)
    axis.margins(y=0.12)


def _long(shown: Mapping[str, Look]) -> bool:
    return sum(len(look.name) for look in shown.values()) > ROOM


def name_bars(axis: Axes, shown: Mapping[str, Look]) -> None:
    """What the bars of each label are called."""
    names = [look.name for look in shown.values()]
    rotation, ha = (30, "right") if _long(shown) else (0, "center")
    axis.set_xticks(range(len(names)), names, fontsize=8, rotation=rotation, ha=ha)


def _places(shown: Iterable[str], pieces: Sequence[pd.DataFrame], number: int, width: float) -> dict[str, float]:
    """Where a piece has its bar of each label: those of one label stand around its place."""
    places = {}
    for place, label in enumerate(shown):
        there = [n for n, piece in enumerate(pieces) if label in set(piece.label)]
        places[label] = place + width * (there.index(number) - (len(there) - 1) / 2) if number in there else place
    return places


def _values(axis: Axes, at: pd.Series, piece: pd.DataFrame) -> None:
    """The interval on each bar, and its value above."""
    tops = piece.value
    if "ci_high" in piece:
        axis.vlines(at, piece.ci_low, piece.ci_high, color="black", lw=1)
        tops = piece.ci_high.fillna(piece.value)
    for x, top, value in zip(at, tops, piece.value, strict=True):
        axis.annotate(f"{value:.3g}", (x, top), (0, 1), textcoords="offset points", ha="center", fontsize=6)


def stacked(axis: Axes, rows: pd.DataFrame, colours: Mapping[str, str] | None = None) -> None:
    """Bars made of kinds, in the order of `colours`, or of memory's leaves; a paler one beside it is published."""
    colours = colours or LEAF_COLOURS
    shown, rows, theirs = looks(rows), preferring_earned(rows), published_of(rows)
    for x, label in enumerate(shown):
        pair = theirs[theirs.label == label]
        _pile(axis, x - 0.2 * bool(len(pair)), rows[rows.label == label], colours, 1.0)
        _pile(axis, x + 0.2, pair, colours, 0.45)
    seen = {_kind_of(quantity) for quantity in rows.quantity[rows.value > 0.005]}
    handles = [axis.bar(0, 0, color=c, label=kind.replace("_", " ")) for kind, c in colours.items() if kind in seen]
    if len(theirs):
        handles.append(axis.bar(0, 0, color="black", alpha=0.3, label="paler: published"))
    below = -0.34 if _long(shown) else -0.14
    axis.legend(handles=handles, fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, below), ncols=3)
    name_bars(axis, shown)


def _pile(axis: Axes, x: float, rows: pd.DataFrame, colours: Mapping[str, str], alpha: float) -> None:
    values, bottom = dict(zip(map(_kind_of, rows.quantity), rows.value, strict=True)), 0.0
    for kind, colour in colours.items():
        value = values.get(kind, 0.0)
        axis.bar(x, value, 0.36, bottom, color=colour, alpha=alpha, edgecolor="black", lw=0.4)
        if value > 6:
            axis.text(x, bottom + value / 2, f"{value:.1f}", ha="center", va="center", fontsize=6)
        bottom += value


def _kind_of(quantity: str) -> str:
    return quantity.partition(":")[2]


def over_seeds(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What is drawn for a label, and beside it what only stands for a published name: the same of seed 0 alone."""
    point = ["label", "quantity", "x"]
    twice = rows.duplicated(point, keep=False) & (rows.paper != OURS)
    return rows[~twice], rows[twice]


def title(axis: Axes, rows: pd.DataFrame, what: str = "", *notes: str) -> None:
    """The published panel where some rows earned it, else `what`; below, what ran, and by which clock; then notes."""
    earned = rows[rows.paper != OURS]
    if len(earned):
        first = earned.iloc[0]
        figure = first.figure.replace("fig", "Fig ").replace("table", "Table ")
        what = f"{PAPERS[first.paper]} {figure}: {first.panel}"
        what += "" if len(published_of(rows)) else ", whose values are in no source"
    ran = f"{rows.setup.iloc[0]}: {', '.join(dict.fromkeys([rows.clock.iloc[0], *rows.evidence]))}"
    room = round(21 * axis.bbox.width / axis.figure.dpi)  # characters of a line
    axis.set_title("\n".join(fill(line, room) for line in (what, ran, *notes) if line), fontsize=8)


def published_of(rows: pd.DataFrame) -> pd.DataFrame:
    """The published points of the curves and bars that some of the rows stand for, each with their label."""
    point = ["paper", "figure", "panel", "system", "quantity"]
    earned = rows.loc[rows.paper != OURS, [*point, "label"]].drop_duplicates()
    return published().merge(earned, on=point)


def doubling(axis: Axes, xs: pd.Series) -> None:
    """A logarithmic axis whose ticks are powers of two; as it is where nothing has an x."""
    if xs.isna().all():
        return
    powers = [2**n for n in range(40) if xs.min() <= 2**n <= xs.max()]
    axis.set_xscale("log", base=2)
    axis.set_xticks(powers, [f"{p // 1024}K" if p >= 1024 else str(p) for p in powers])
    axis.xaxis.set_minor_locator(NullLocator())
