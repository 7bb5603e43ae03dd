"""How tables and figures name a row's system."""

import pandas as pd

from kvarena.harness.run.published import OURS


def shown(system: str, paper: str) -> str:
    """`vLLM, replayed` of a row that earned a published name: what ran is ours. Else the row's own system."""
    return system if paper == OURS else f"{system}, replayed"


def swept(rows: pd.DataFrame) -> pd.Series:
    """What a sweep says behind the labels of its rows, ` [params.rounds=3]`; empty where nothing was swept."""
    return rows.label.str.extract(r"( \[.*\])$", expand=False).fillna("")


def shown_names(rows: pd.DataFrame) -> dict[str, str]:
    """label -> how a legend names it, as `shown`; of our own what times it is left out where it is one for all."""
    first = rows.drop_duplicates("label")
    ends = {label.rpartition("/")[2] for label in first.label}
    named = {}
    for label, system, paper in zip(first.label, first.system, first.paper, strict=True):
        own = label.rpartition("/")[0] if len(ends) == 1 and "/" in label else label
        named[str(label)] = shown(own if paper == OURS else system, paper)
    return named
