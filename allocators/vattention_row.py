"""One row of vAttention's virtual tensors: what is mapped in it, and who lives there."""

from typing import NamedTuple

from kvarena.allocators.page_groups import RowGeometry


class Marks(NamedTuple):
    """What a row adds to the policy's sums while a sequence lives in it."""

    needed: int = 0  # page-groups that its length needs
    mapped: int = 0  # page-groups mapped
    covered: int = 0  # bytes mapped below its final length
    rounded: int = 0  # bytes mapped up to the end of the page-group that its final length ends in


class Row:
    """A row holds the first `len(slabs[g])` page-groups of every tensor of layer group `g`; the rest is unmapped."""

    __slots__ = ("admitted", "capacity", "enough_until", "final", "index", "length", "marks", "seq_id", "slabs")

    def __init__(self, index: int, num_groups: int) -> None:
        self.index = index
        self.slabs: list[list[int]] = [[] for _ in range(num_groups)]  # by layer group, in the order of positions
        self.seq_id: int | None = None
        self.admitted = 0  # serial number of the admission
        self.length = 0  # tokens
        self.final = 0  # tokens
        self.capacity = 0  # tokens that fit what is mapped
        self.enough_until = 0  # tokens that fit what `length` needs
        self.marks = Marks()

    def mapped(self, geometries: tuple[RowGeometry, ...]) -> int:
        """Page-groups mapped, over all tensors."""
        return sum(g.num_tensors * len(slabs) for g, slabs in zip(geometries, self.slabs, strict=True))

    def settle(self, geometries: tuple[RowGeometry, ...], max_tokens: int) -> None:
        """Recompute what follows from slabs, length and final length."""
        self.final = max(self.final, self.length)
        self.capacity = self.enough_until = max_tokens
        needed = mapped = covered = rounded = 0
        for g, slabs in zip(geometries, self.slabs, strict=True):
            mapped_bytes = len(slabs) * g.page_group
            slabs_needed = g.slabs_for(self.length)
            needed += g.num_tensors * slabs_needed
            mapped += g.num_tensors * len(slabs)
            covered += g.num_tensors * min(g.resident_bytes(self.final), mapped_bytes)
            rounded += g.num_tensors * min(g.slabs_for(self.final) * g.page_group, mapped_bytes)
            self.capacity = min(self.capacity, g.tokens_in(len(slabs), max_tokens))
            self.enough_until = min(self.enough_until, g.tokens_in(slabs_needed, max_tokens))
        self.marks = Marks(needed, mapped, covered, rounded)
