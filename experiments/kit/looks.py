"""How each line and bar of a panel looks, and what its legend calls it."""

from typing import NamedTuple

import pandas as pd

from kvarena.experiments.kit import plots
from kvarena.experiments.kit.legend import shown_names
from kvarena.harness.run.published import OURS

# Where all are of one allocator: its own colour would tell nothing.
SEVERAL = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
# vAttention's figures have several systems of one allocator, told apart by colour; elsewhere an allocator's is its own.
PAPER = "vattention"
PAPER_COLOURS = {
    "vLLM": "#56B4E9",
    "FA2_Paged": "#0072B2",
    "FI_Paged": "#CC79A7",
    "FA2_vAttention": "#009E73",
    "FI_vAttention": "#E69F00",
}


class Look(NamedTuple):
    """One label's: no two of a panel share both colour and dash, or both colour and marker."""

    name: str
    colour: str
    dash: str
    marker: str


def looks(rows: pd.DataFrame) -> dict[str, Look]:
    """label -> look, in the order of the rows: what stands for a published system is drawn through, ours is not."""
    order = list(dict.fromkeys(rows.label))
    first = preferring_earned(rows).assign(own=lambda r: r.paper == OURS).sort_values("own", kind="stable")
    first = first.drop_duplicates("label")
    names, colours, found = shown_names(first), plots.colours_of(rows.allocator), dict[str, Look]()
    alike = first.allocator.nunique() == 1 < len(first)
    for place, each in enumerate(first.to_dict("records")):
        colour = SEVERAL[place % len(SEVERAL)] if alike else colours[each["allocator"]]
        if each["paper"] == PAPER:
            colour = PAPER_COLOURS.get(each["system"], colour)
        number = sum(look.colour == colour for look in found.values()) + (each["own"] and not first.own.all())
        dash, marker = plots.DASHES[number % len(plots.DASHES)], plots.MARKERS[number % len(plots.MARKERS)]
        found[each["label"]] = Look(names[each["label"]], colour, dash, marker)
    return {label: found[label] for label in order}


def preferring_earned(rows: pd.DataFrame) -> pd.DataFrame:
    """One row for each label, setup, quantity and x: that which earned a published name where there are two."""
    order = rows.assign(own=rows.paper == OURS).sort_values("own", kind="stable")
    return order.drop_duplicates(["label", "setup", "quantity", "x"]).sort_index().drop(columns="own")
