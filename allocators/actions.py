"""What has to be done to real memory, as policies say it: a store (`memory/store.py`) performs it, a clock prices it.

Actions of one step are performed in order, before its forward pass; those planned ahead run beside it.
"""

from typing import NamedTuple


class Map(NamedTuple):
    """Map page-group `page_group` of every tensor of layer group `group` as the `ordinal`-th of `row`."""

    group: int
    row: int
    ordinal: int
    page_group: int


class Unmap(NamedTuple):
    """Undo a `Map`; it is free again, unless other rows map it too."""

    group: int
    row: int
    ordinal: int
    page_group: int


class CopyBlock(NamedTuple):
    """Copy a block in every tensor (copy-on-write)."""

    source: int
    target: int


class CopyRow(NamedTuple):
    """Copy bytes [start, stop) of one row to another, in every tensor of layer group `group`."""

    group: int
    source: int
    target: int
    start: int
    stop: int


class SwapOut(NamedTuple):
    """Copy a block of every tensor to the CPU pool; `source` is free again."""

    source: int
    target: int  # a block of the CPU pool


class SwapIn(NamedTuple):
    """Copy a block of every tensor back; `source`, a block of the CPU pool, is free again."""

    source: int
    target: int


Action = Map | Unmap | CopyBlock | CopyRow | SwapOut | SwapIn
