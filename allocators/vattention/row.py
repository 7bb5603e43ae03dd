"""One row of vAttention's virtual tensors: what is mapped in it, and who lives there."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvarena.allocators.vattention.page_groups import RowGeometry


class Marks(NamedTuple):
    """What a row adds to the policy's sums while a sequence lives in it."""

    needed: int = 0  # page-groups that its length needs
    mapped: int = 0  # page-groups mapped
    covered: int = 0  # bytes mapped below its final length
    rounded: int = 0  # bytes mapped up to the end of the page-group that its final length ends in

    def replaced(self, before: "Marks", after: "Marks") -> "Marks":
        """These sums, after one of the marks in them has changed."""
        return Marks(
            self.needed - before.needed + after.needed,
            self.mapped - before.mapped + after.mapped,
            self.covered - before.covered + after.covered,
            self.rounded - before.rounded + after.rounded,
        )


NOTHING = Marks()


@dataclass(slots=True, eq=False)
class Row:
    """The first `len(slabs[g])` page-groups of every tensor of layer group `g` are mapped; the rest is addresses."""

    index: int
    slabs: list[list[int]]  # by layer group, in the order of positions
    mapped: int = 0  # page-groups, over all tensors
    seq_id: int | None = None
    admitted: int = 0  # serial number of the admission
    length: int = 0  # tokens
    final: int = 0  # tokens
    # What follows from these, while somebody lives here:
    capacity: int = 0  # tokens that fit what is mapped
    enough_until: int = 0  # tokens that fit what `length` needs
    surplus: int = 0  # page-groups that `length` does not need
    surplus_ahead: int = 0  # of these, what one token more than `enough_until` would not need
    marks: Marks = NOTHING

    def settle(self, geometries: Sequence[RowGeometry], max_tokens: int) -> None:
        """Recompute what follows from slabs, length and final length."""
        marks = self.marks
        if self.mapped != marks.mapped or self.length > self.final or marks is NOTHING:
            covered, rounded = self._settle_mapped(geometries, max_tokens)
        else:
            _, _, covered, rounded = marks  # slabs and final length are as they were
        length, enough_until = self.length, max_tokens
        needed = 0
        for g in geometries:
            slabs = g.slabs_for(length)
            needed += g.num_tensors * slabs
            enough_until = min(enough_until, g.tokens_in(slabs, max_tokens))
        self.enough_until = enough_until
        if self.mapped == needed and length <= self.capacity:
            self.surplus = self.surplus_ahead = 0
        else:
            self.surplus = self._beyond(geometries, length)
            self.surplus_ahead = self._beyond(geometries, min(enough_until + 1, max_tokens))
        self.marks = Marks(needed, self.mapped, covered, rounded)

    def _settle_mapped(self, geometries: Sequence[RowGeometry], max_tokens: int) -> tuple[int, int]:
        """Recompute what follows from slabs and final length: `capacity`, and the marks `covered` and `rounded`."""
        final = self.final = max(self.final, self.length)
        self.capacity = max_tokens
        covered = rounded = 0
        for g, slabs in zip(geometries, self.slabs, strict=True):
            tensors, mapped, end = g.num_tensors, len(slabs), g.slabs_for(final)
            covered += tensors * min(mapped * g.page_group, g.resident_bytes(final))
            rounded += tensors * g.page_group * min(end, mapped)
            self.capacity = min(self.capacity, g.tokens_in(mapped, max_tokens))
        return covered, rounded

    def _beyond(self, geometries: Sequence[RowGeometry], length: int) -> int:
        """Page-groups mapped that `length` tokens do not need."""
        beyond = 0
        for g, slabs in zip(geometries, self.slabs, strict=True):
            beyond += g.num_tensors * max(0, len(slabs) - g.slabs_for(length))
        return beyond


class IdleRows:
    """Rows without a request, ordered by how much is mapped in them."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows
        self._order = sorted((row.mapped, row.index) for row in rows)

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Row]:
        return (self._rows[index] for _, index in self._order)

    def add(self, row: Row) -> None:
        """A row goes idle."""
        insort(self._order, (row.mapped, row.index))

    def remove(self, row: Row) -> None:
        """A row is taken, or about to change."""
        del self._order[bisect_left(self._order, (row.mapped, row.index))]

    def best_fit(self, needed: int) -> Row:
        """The least full row that holds `needed` page-groups, or else the fullest of all."""
        i = bisect_left(self._order, (needed, -1))
        return self._rows[self._order[i][1]] if i < len(self._order) else self.fullest()

    def fullest(self) -> Row:
        """The row with the most page-groups; of several the first."""
        return self._rows[self._order[bisect_left(self._order, (self._order[-1][0], -1))][1]]

    def least_full_first(self) -> Iterable[Row]:
        """Rows with anything mapped, as they are now."""
        return [self._rows[index] for _, index in self._order[bisect_left(self._order, (1, -1)) :]]
