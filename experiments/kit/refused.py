"""The word beside a comparison whose systems refused requests: under tables, and above figures."""

from textwrap import fill

import pandas as pd
from matplotlib.figure import Figure

from kvarena.harness.accounts.refusals import QUANTITIES, REFUSED, REFUSED_OF

LETTERS = 16  # of a line, for each inch of a figure


def is_of_refusals(summary: pd.DataFrame) -> pd.Series:
    """Which rows say what systems refused."""
    return summary.quantity.isin(QUANTITIES)


def refusals_said(summary: pd.DataFrame) -> str:
    """`refused at arrival: orca_max/fa2 3 of 6, paged/fa2 none; ...`; empty where nobody refused any."""
    rows = summary[is_of_refusals(summary)]
    if not rows.value[rows.quantity == REFUSED].any():
        return ""
    by_system = rows.pivot_table(index=["setup", "label"], columns="quantity", values="value", sort=False).reset_index()
    several = by_system.setup.nunique() > 1
    said = ", ".join(
        " ".join([each["label"], *([f"({each['setup']})"] if several else []), _count(each[REFUSED], each[REFUSED_OF])])
        for each in by_system.to_dict("records")
    )
    unlike = (by_system.groupby("setup")[REFUSED].nunique() > 1).any()
    compared = "not the same requests are compared" if unlike else "what is shown is of the others"
    return f"refused at arrival: {said}; {compared}"


def _count(refused: float, arrived: float) -> str:
    return f"{refused:.0f} of {arrived:.0f}" if refused else "none"


def say_refusals(figure: Figure, summary: pd.DataFrame) -> None:
    """Write it above a figure."""
    if said := refusals_said(summary):
        lines = fill(said, round(LETTERS * figure.get_figwidth()))
        figure.text(0.5, 1.01, lines, ha="center", va="bottom", fontsize=7, color="#C00000")
