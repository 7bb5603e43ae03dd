"""How many requests each system refused at arrival: what is compared is of those that it has served.

A replay is told like a trace's account (`told.py`); the summary has one record of each system, over all its replays.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

REFUSED = "refused"  # quantity: of the replay that refuses most
REFUSED_OF = "refused_of"  # the requests of that replay
LEAST_REFUSED = "refused:smallest"  # of the replay that refuses fewest, where they differ
QUANTITIES = (REFUSED, REFUSED_OF, LEAST_REFUSED)


@dataclass(frozen=True, slots=True)
class Refusals:
    """What one system refused in one replay, and what the system is, as rows of summary.csv have it."""

    setup: str
    label: str
    allocator: str
    kernel: str
    model: str
    requests: int
    refused: int
    first: str = ""  # why the first was refused

    @property
    def origin(self) -> str:
        """The system and what it serves."""
        return f"refused {self.setup} {self.label}"

    @property
    def losses(self) -> tuple[int, ...]:
        """What must not grow in silence; nothing where nobody is refused."""
        return (self.refused,) if self.refused else ()

    def __str__(self) -> str:
        """`orca_max/fa2 refuses 3 of 6 requests; the first: ...`."""
        return f"{self.label} refuses {self.refused} of {self.requests} requests; the first: {self.first}"


def by_system(replays: Sequence[Refusals]) -> Iterator[list[Refusals]]:
    """The replays of each system, the one that refuses most first."""
    for origin in dict.fromkeys(replay.origin for replay in replays):
        own = [replay for replay in replays if replay.origin == origin]
        yield sorted(own, key=attrgetter("refused"), reverse=True)


def quantities(own: Sequence[Refusals]) -> dict[str, int]:
    """Quantity -> requests, for summary.csv; `own` are of one system, as `by_system` has them."""
    most, least = own[0], own[-1]
    counts = {REFUSED: most.refused, REFUSED_OF: most.requests}
    return counts if least.refused == most.refused else {**counts, LEAST_REFUSED: least.refused}
