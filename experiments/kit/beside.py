"""The words beside what is compared, under tables and above figures: requests dropped, refused, repeated, left out."""

from collections.abc import Iterator
from textwrap import fill

import pandas as pd
from matplotlib.figure import Figure

from kvarena.harness.accounts.refusals import QUANTITIES, REFUSED, REFUSED_OF
from kvarena.harness.accounts.replays import ACCOUNT

LETTERS = 16  # of a line, for each inch of a figure
_OF_TRACES = {
    "requests_dropped": "are dropped",
    "requests_repeated": "are repeats",
    "requests_left_out": "are left out",
}


def is_account(summary: pd.DataFrame) -> pd.Series:
    """Which rows say what became of traces, and what systems refused."""
    return summary.label.str.startswith(ACCOUNT) | summary.quantity.isin(QUANTITIES)


def said_beside(summary: pd.DataFrame) -> str:
    """`refused at arrival: orca_max/fa2 3 of 6, paged/fa2 none; ...`, and the like of each trace; empty where all is
    served, once."""
    return "; ".join([*_of_traces(summary), *_of_refusals(summary)])


def say_beside(figure: Figure, summary: pd.DataFrame) -> None:
    """Write it above a figure."""
    if said := said_beside(summary):
        lines = fill(said, round(LETTERS * figure.get_figwidth()))
        figure.text(0.5, 1.01, lines, ha="center", va="bottom", fontsize=7, color="#C00000")


def _of_traces(summary: pd.DataFrame) -> Iterator[str]:
    for quantity, what in _OF_TRACES.items():
        counts = summary[summary.quantity.isin([quantity, f"{quantity}:largest"])]
        for each in counts.to_dict("records"):
            most = "up to " if each["quantity"] != quantity else ""
            yield f"{each['label']}: {most}{each['value']:.0f} requests {what}"


def _of_refusals(summary: pd.DataFrame) -> Iterator[str]:
    rows = summary[summary.quantity.isin(QUANTITIES)]
    if not rows.value[rows.quantity == REFUSED].any():
        return
    by_system = rows.pivot_table(index=["setup", "label"], columns="quantity", values="value", sort=False).reset_index()
    several = by_system.setup.nunique() > 1
    said = ", ".join(
        " ".join([each["label"], *([f"({each['setup']})"] if several else []), _count(each[REFUSED], each[REFUSED_OF])])
        for each in by_system.to_dict("records")
    )
    unlike = (by_system.groupby("setup")[REFUSED].nunique() > 1).any()
    compared = "not the same requests are compared" if unlike else "what is shown is of the others"
    yield f"refused at arrival: {said}; {compared}"


def _count(refused: float, arrived: float) -> str:
    return f"{refused:.0f} of {arrived:.0f}" if refused else "none"
