"""The published curve on the left, ours on the right, on the same axes: a small drawing as inline SVG.

Drawn by hand, not by matplotlib, since a page has a hundred of them: a drawing is a few hundred bytes and takes its
colours and fonts from the page.
"""

import math
from collections.abc import Callable, Sequence
from html import escape
from itertools import pairwise

import pandas as pd
from markupsafe import Markup

from kvarena.harness.scorecard.figures import Compared
from kvarena.harness.scorecard.text import number

Draw = Callable[[pd.DataFrame, str, list[str], float], str]  # points, column, labels, left edge -> SVG

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666", "#000000")  # Okabe and Ito
WIDTH, HEIGHT, LEFT, GAP, TOP, BOTTOM = 640, 210, 52, 16, 20, 26
PLOT_WIDTH, PLOT_HEIGHT = (WIDTH - LEFT - GAP - 6) / 2, HEIGHT - TOP - BOTTOM


def pair_drawing(compared: Compared) -> Markup:
    """Lines where there is an x, a drawing for each panel; else bars, all panels in one drawing."""
    kinds = compared.points["quantity"].str.partition(":")[2].map(lambda kind: f": {kind}" if kind else "")
    points = compared.points.assign(label=(compared.points["system"] + kinds).str.replace("_", " "))
    if points["x"].notna().all():
        panels = [(f"{name}: ", rows) for name, rows in points.groupby("panel", sort=False)]
        return Markup("\n").join(_drawing(compared, name, rows, _lines) for name, rows in panels)
    if points["panel"].nunique() > 1:
        points = points.assign(label=points["panel"] + ", " + points["label"])
    return _drawing(compared, "", points, _bars)


def _drawing(compared: Compared, name: str, points: pd.DataFrame, draw: Draw) -> Markup:
    names = list(dict.fromkeys(points["label"]))
    parts = [draw(points, column, names, left) for column, left in _sides()]
    title = f"{name}{compared.quantity.replace('_', ' ')}, {compared.unit}"
    heads = "".join(
        f'<text x="{left + PLOT_WIDTH / 2:.0f}" y="12" text-anchor="middle">{head}</text>'
        for (_, left), head in zip(_sides(), ("published", _ours(compared)), strict=True)
    )
    keys = "".join(
        f'<li><span style="background:{_COLOURS[i % len(_COLOURS)]}"></span>{escape(name)}</li>'
        for i, name in enumerate(names)
    )
    return Markup(
        f'<figure class="pair"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}, published and here">'
        f'{heads}{"".join(parts)}</svg><ul class="key">{keys}</ul></figure>'
    )


def _ours(compared: Compared) -> str:
    places = compared.points["clock"] + " on " + compared.points["device"]
    return escape(f"here, {', '.join(dict.fromkeys(places))}")


def _sides() -> tuple[tuple[str, float], tuple[str, float]]:
    return ("published", LEFT), ("value", LEFT + PLOT_WIDTH + GAP)


class _Scale:
    """Values to positions; logarithmic where they span more than 30 to 1 and none is 0 or less."""

    def __init__(self, values: Sequence[float], start: float, end: float, from_zero: bool) -> None:
        self.low, self.high = min(values), max(values)
        self.logarithmic = self.low > 0 and self.high / self.low > 30
        if from_zero and not self.logarithmic:
            self.low, self.high = min(0.0, self.low), max(0.0, self.high)
        if self.low == self.high:
            self.low, self.high = self.low - 1, self.high + 1
        self._start, self._length = start, end - start

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.logarithmic:
            low, high, at = math.log(low), math.log(high), math.log(value)
        return self._start + self._length * (at - low) / (high - low)

    @property
    def ticks(self) -> list[float]:
        """Both ends, and the middle."""
        middle = math.sqrt(self.low * self.high) if self.logarithmic else (self.low + self.high) / 2
        return [self.low, middle, self.high]


def _scales(points: pd.DataFrame, left: float) -> tuple[_Scale | None, _Scale]:
    """One scale of values for both sides."""
    both = [*points["value"], *points["published"]]
    y = _Scale(both, TOP + PLOT_HEIGHT, TOP, from_zero=True)
    x = None if points["x"].isna().any() else _Scale(list(points["x"]), left + 6, left + PLOT_WIDTH - 6, False)
    return x, y


def _frame(x: _Scale | None, y: _Scale, left: float) -> str:
    bottom, right = TOP + PLOT_HEIGHT, left + PLOT_WIDTH
    parts = [f'<path class="axis" d="M{left:.1f} {TOP}V{bottom}H{right:.1f}"/>']
    for tick in y.ticks:
        parts.append(f'<path class="grid" d="M{left:.1f} {y(tick):.1f}H{right:.1f}"/>')
        if left == LEFT:
            parts.append(
                f'<text x="{left - 4}" y="{y(tick) + 4:.1f}" text-anchor="end">{number(float(f"{tick:.3g}"))}</text>'
            )
    for tick, anchor in zip(x.ticks if x else (), ("start", "middle", "end"), strict=False):
        parts.append(
            f'<text x="{x(tick):.1f}" y="{bottom + 14}" text-anchor="{anchor}">{number(tick)}</text>' if x else ""
        )
    return "".join(parts)


def _lines(points: pd.DataFrame, column: str, names: list[str], left: float) -> str:
    x, y = _scales(points, left)
    assert x is not None
    parts = [_frame(x, y, left)]
    for i, name in enumerate(names):
        rows = points[points["label"] == name].sort_values("x")
        places = [f"{x(at):.1f} {y(value):.1f}" for at, value in zip(rows["x"], rows[column], strict=True)]
        colour = _COLOURS[i % len(_COLOURS)]
        line = "".join(f"M{a}L{b}" for a, b in pairwise(places)) if len(places) > 1 else ""
        dots = "".join(f"M{place}h0" for place in places)
        parts.append(
            f'<path class="line" stroke="{colour}" d="{line}"/><path class="dots" stroke="{colour}" d="{dots}"/>'
        )
    return "".join(parts)


def _bars(points: pd.DataFrame, column: str, names: list[str], left: float) -> str:
    _, y = _scales(points, left)
    parts = [_frame(None, y, left)]
    width = (PLOT_WIDTH - 12) / len(points)
    zero = y(y.low if y.logarithmic else 0.0)
    for i, (label, value) in enumerate(zip(points["label"], points[column], strict=True)):
        top, bottom = sorted((y(value), zero))
        colour = _COLOURS[names.index(label) % len(_COLOURS)]
        parts.append(
            f'<rect x="{left + 6 + i * width:.1f}" y="{top:.1f}" width="{width * 0.8:.1f}" '
            f'height="{max(bottom - top, 0.5):.1f}" fill="{colour}"/>'
        )
    return "".join(parts)
