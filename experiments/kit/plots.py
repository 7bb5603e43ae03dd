"""The look shared by all figures: one colour per allocator, one line style per kernel."""

import itertools
from collections.abc import Iterable, Iterator

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb, to_hex
from matplotlib.figure import Figure

mpl.use("Agg")

# Colour-blind safe (Okabe and Ito, 2008); one per allocator, wherever it is drawn.
COLOURS = {
    "static": "#D55E00",
    "paged": "#0072B2",
    "vattention": "#009E73",
    "orca_max": "#D55E00",
    "orca_pow2": "#E69F00",
    "orca_oracle": "#CC79A7",
    "contiguous": "#A08A00",
    "paged_reserved": "#56B4E9",
    "fastertransformer": "#666666",
}
NEWCOMERS = ("#882255", "#44AA99", "#999933", "#332288", "#AA4499", "#661100")  # after Tol (2021)
MARKERS = "osD^vP*X<>"
DASHES = ("-", "--", ":", "-.")


def colours_of(allocators: Iterable[str]) -> dict[str, str]:
    """The colour of each allocator of a figure, no matter in which order they are drawn.

    Those that the figures do not know get colours that no other has: their own by name, or the next where it is taken.
    """
    unknown = sorted(set(allocators) - set(COLOURS))
    colours = dict(COLOURS)
    for name in unknown:
        first = sum(name.encode()) % len(NEWCOMERS)
        colours[name] = next(c for c in _newcomers(first) if c not in colours.values())
    return colours


def _newcomers(first: int) -> Iterator[str]:
    """The colours of newcomers, beginning with one of them; then hues without end."""
    yield from NEWCOMERS[first:] + NEWCOMERS[:first]
    for number in itertools.count(1):
        yield to_hex(tuple(hsv_to_rgb((number * 0.618 % 1, 0.6, 0.55))))  # steps of the golden ratio: no two hues meet


def colour_of(allocator: str, among: Iterable[str] = ()) -> str:
    """The colour of one allocator `among` those of its figure."""
    return colours_of((allocator, *among))[allocator]


def canvas(rows: int, columns: int, width: float = 4.6, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    """A figure of rows x columns panels, and its axes in reading order."""
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    plt.close(figure)  # it lives on as an object; pyplot need not keep it
    return figure, list(axes.flat)


LEAF_COLOURS = {
    "live": "#009E73",
    "cached": "#66C2A5",
    "reserved": "#56B4E9",
    "over_estimate": "#D55E00",
    "rounding": "#E69F00",
    "retained": "#F0E442",
    "stranded": "#CC79A7",
    "free": "#DDDDDD",
    "remainder": "#999999",
}
