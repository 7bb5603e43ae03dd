"""The memory timeline: a lane for each request, as high as what it holds, coloured by leaf; a panel for each system."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvarena.allocators.holding import OWNED
from kvarena.experiments.kit import plots
from kvarena.experiments.ours.step_frames import Film

PS = 10**12
LANE = 0.9  # of the distance between two lanes, for the largest holding


def timeline(film: Film) -> pd.DataFrame:
    """What every request holds at the start of every step: columns system, request, time_s, leaf, bytes.

    Zeros are left out, but for the moment at which a request's memory is gone.
    """
    rows: list[tuple[str, int, float, str, int]] = []
    held: set[int] = set()
    ends_s = [*(film.steps.start_ps / PS), (film.steps.start_ps + film.steps.duration_ps).max() / PS]
    for time_s, frame in zip(ends_s, [*film.frames, None], strict=True):
        holdings = frame.holdings if frame else {}
        rows += [(film.system, gone, time_s, OWNED[0], 0) for gone in sorted(held - holdings.keys())]
        for request, holding in holdings.items():
            owned = zip(OWNED, holding.leaves, strict=True)
            rows += [(film.system, request, time_s, leaf, size) for leaf, size in owned if size]
        held = set(holdings)
    return pd.DataFrame(rows, columns=["system", "request", "time_s", "leaf", "bytes"])


def draw_timeline(table: pd.DataFrame, title: str) -> Figure:
    """Draw such a table. One scale for all lanes."""
    systems = list(dict.fromkeys(table["system"]))
    requests = sorted(table["request"].unique())
    figure, axes = plots.canvas(1, len(systems), width=5.2, height=max(3.0, 0.42 * len(requests)))
    largest = table.groupby(["system", "request", "time_s"])["bytes"].sum().max()
    for axis, system in zip(axes, systems, strict=True):
        rows = table[table["system"] == system]
        for lane, request in enumerate(requests):
            _lane(axis, rows[rows["request"] == request], lane, LANE / largest)
        axis.set_yticks(range(len(requests)), [f"{request}" for request in requests])
        axis.set(
            ylim=(-0.1, len(requests)),
            xlim=(0, table["time_s"].max()),
            xlabel="time, s",
            ylabel="request",
            title=system,
        )
    shown = [leaf for leaf in OWNED if leaf in set(table["leaf"])]
    handles = [
        axes[0].fill_between([], [], color=plots.LEAF_COLOURS[leaf], label=leaf.replace("_", " ")) for leaf in shown
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(shown), frameon=False)
    figure.suptitle(f"{title}\na lane's full height is {largest / 1e6:,.0f} MB")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    return figure


def _lane(axis: Axes, rows: pd.DataFrame, lane: int, scale: float) -> None:
    """One request's leaves, stacked upwards from its line."""
    if rows.empty:
        return
    wide = rows.pivot_table(index="time_s", columns="leaf", values="bytes", aggfunc="sum").fillna(0)
    bottom = wide.iloc[:, 0] * 0 + lane
    for leaf in [leaf for leaf in OWNED if leaf in wide]:
        top = bottom + wide[leaf] * scale
        axis.fill_between(wide.index, bottom, top, step="post", color=plots.LEAF_COLOURS[leaf], lw=0)
        bottom = top
