"""What each sequence holds of a pool: which units, in which order, and its bytes by leaf. Pictures are made from it."""

from typing import NamedTuple

OWNED = ("live", "reserved", "over_estimate", "rounding", "retained")  # leaves that belong to a sequence


class Units(NamedTuple):
    """The units of a pool, all alike: blocks, rows of static memory, page-groups in every tensor."""

    name: str
    num_units: int
    tokens: float  # that a unit holds


class Holding(NamedTuple):
    """One sequence's memory: units in the order of its positions, and bytes by leaf as OWNED names them."""

    length: int  # tokens
    units: tuple[int, ...]
    leaves: tuple[int, ...]


class Holdings(NamedTuple):
    """What sequences hold of a pool, by id; and the units that are kept ready and belong to nobody."""

    units: Units
    of: dict[int, Holding]
    idle: tuple[int, ...] = ()
