"""The names of the two layouts; `view.py` draws them. Imports no torch, so that policies can say which they need."""

from enum import StrEnum


class Layout(StrEnum):
    """The two ways in which a kernel may find K/V."""

    CONTIGUOUS = "contiguous"  # one row per sequence
    PAGED = "paged"  # blocks, found through a block table
