"""The rows of vAttention's virtual tensors (section 5): which sequence lives in which, and what is mapped there.

    a row in use     |===== needed =====|== surplus ==|   addresses only

A row in use is owed what its length needs. All else can be taken back (`reclamation.py`), so whether a sequence can be
served depends on one sum: the page-groups that rows in use need.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

from kvarena.allocators.actions import Action, Map, Unmap
from kvarena.allocators.integrity import expect
from kvarena.allocators.policy import NotResidentError
from kvarena.allocators.usage import extent_usage
from kvarena.allocators.vattention.page_groups import PageGroupPool, RowGeometry


class Marks(NamedTuple):
    """What a row adds to the sums while it is in use."""

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
    """In tensors of layer group `g` its first `len(page_groups[g])` page-groups are mapped; the rest is addresses."""

    index: int
    page_groups: list[list[int]]  # by layer group, in the order of positions
    mapped: int = 0  # page-groups, over all tensors
    seq_id: int | None = None
    admitted: int = 0  # serial number of the admission
    length: int = 0  # tokens
    final: int = 0  # tokens
    foreign: Seq[int] = ()  # leading page-groups, by layer group, that only others own by now; none if empty
    # What follows from these, while the row is in use:
    capacity: int = 0  # tokens that fit what is mapped
    enough_until: int = 0  # tokens that fit what `length` needs
    surplus: int = 0  # page-groups that `length` does not need
    surplus_ahead: int = 0  # of these, what one token more than `enough_until` would not need
    marks: Marks = NOTHING

    def owned(self, group: int) -> list[int]:
        """Its own page-groups, shared ones too."""
        return self.page_groups[group][self.foreign[group] :] if self.foreign else self.page_groups[group]

    def spare(self, margin: int) -> int:
        """Page-groups beyond what `margin`, 0 or 1, more tokens need."""
        return self.surplus_ahead if margin and self.length == self.enough_until else self.surplus

    def measure(self, geometries: Seq[RowGeometry], max_tokens: int) -> None:
        """Recompute what follows from page-groups, length and final length."""
        marks = self.marks
        if self.mapped != marks.mapped or self.length > self.final or marks is NOTHING:
            covered, rounded = self._measure_mapped(geometries, max_tokens)
        else:
            _, _, covered, rounded = marks  # page-groups and final length are as they were
        length, enough_until = self.length, max_tokens
        needed = 0
        for g in geometries:
            page_groups = g.page_groups_for(length)
            needed += g.num_tensors * page_groups
            enough_until = min(enough_until, g.tokens_in(page_groups, max_tokens))
        self.enough_until = enough_until
        if self.mapped == needed and length <= self.capacity:
            self.surplus = self.surplus_ahead = 0
        else:
            self.surplus = self._beyond(geometries, length)
            self.surplus_ahead = self._beyond(geometries, min(enough_until + 1, max_tokens))
        self.marks = Marks(needed, self.mapped, covered, rounded)

    def _measure_mapped(self, geometries: Seq[RowGeometry], max_tokens: int) -> tuple[int, int]:
        """Recompute what follows from page-groups and final length: `capacity`, and `covered` and `rounded`."""
        final = self.final = max(self.final, self.length)
        self.capacity = max_tokens
        covered = rounded = 0
        for g, page_groups in zip(geometries, self.page_groups, strict=True):
            tensors, mapped, end = g.num_tensors, len(page_groups), g.page_groups_for(final)
            covered += tensors * min(mapped * g.page_group, g.resident_bytes(final))
            rounded += tensors * g.page_group * min(end, mapped)
            self.capacity = min(self.capacity, g.tokens_in(mapped, max_tokens))
        return covered, rounded

    def _beyond(self, geometries: Seq[RowGeometry], length: int) -> int:
        """Page-groups mapped that `length` tokens do not need."""
        beyond = 0
        for g, page_groups in zip(geometries, self.page_groups, strict=True):
            beyond += g.num_tensors * max(0, len(page_groups) - g.page_groups_for(length))
        return beyond


class Rows:
    """Rows, page-groups, and the sums over rows in use. Memory is counted in page-groups; each fits any tensor."""

    def __init__(self, geometries: tuple[RowGeometry, ...], page_groups: int, num_rows: int, max_tokens: int) -> None:
        """`geometries` by layer group; `page_groups` of memory."""
        self.geometries = geometries
        self.max_tokens = max_tokens
        self.total = self.free = page_groups
        self.pools = [PageGroupPool(page_groups // g.num_tensors) for g in geometries]
        self.all = [Row(i, [[] for _ in geometries]) for i in range(num_rows)]
        self.live: dict[int, Row] = {}  # by sequence, in order of admission
        self.with_surplus: dict[int, Row] = {}  # rows in use that have more than they need, by index
        self.sums = NOTHING  # over rows in use; what several of them share, once
        self.live_bytes = 0  # of K/V in rows in use; what several of them share, once
        self.shared = 0  # page-groups that rows in use own, counted beyond their first owner
        self.changed = True  # a sequence came or went, or was mapped more, since what comes next was planned
        self._admissions = 0
        bends = any(g.window is not None for g in geometries)
        self._token_bytes = None if bends else sum(g.num_tensors * g.token_stride for g in geometries)

    def bytes_for(self, length: int) -> int:
        """Bytes of K/V of a sequence of `length` tokens."""
        if self._token_bytes is not None:
            return length * self._token_bytes
        return sum([g.num_tensors * g.resident_bytes(length) for g in self.geometries])

    def page_groups_for(self, length: int) -> int:
        """Page-groups that a sequence of `length` tokens needs, over all tensors."""
        return sum([g.num_tensors * g.page_groups_for(length) for g in self.geometries])

    def over_tensors(self, page_groups: Iterable[int]) -> int:
        """Page-groups over all tensors, of so many in each tensor by layer group."""
        return sum([n * g.num_tensors for n, g in zip(page_groups, self.geometries, strict=True)])

    def missing(self, row: Row, length: int) -> int:
        """Page-groups that a row lacks for `length` tokens."""
        missing = 0
        for mapped, g in zip(row.page_groups, self.geometries, strict=True):
            missing += g.num_tensors * max(0, g.page_groups_for(length) - len(mapped))
        return missing

    def lacking(self, row: Row, want: Seq[int]) -> int:
        """Page-groups that a row lacks to have `want` in each tensor, by layer group."""
        return self.over_tensors([max(0, n - len(had)) for n, had in zip(want, row.page_groups, strict=True)])

    def resident(self, seq_id: int) -> Row:
        """The row of a sequence."""
        if seq_id not in self.live:
            raise NotResidentError(seq_id)
        return self.live[seq_id]

    # ---- who lives where ---------------------------------------------------------------------------------------

    def occupy(self, row: Row, seq_id: int, length: int, final: int) -> None:
        """Let a sequence live in a row; nothing is mapped."""
        self._admissions += 1
        row.admitted = self._admissions
        self.live[seq_id] = row
        self.assign(row, seq_id, length, final)

    def assign(self, row: Row, seq_id: int, length: int, final: int) -> None:
        """Let a row hold the K/V of so many tokens, under this id."""
        self.live_bytes += self.bytes_for(length) - self.bytes_for(row.length)
        self.sums = self.sums.replaced(row.marks, NOTHING)
        row.seq_id, row.length, row.final, row.marks = seq_id, length, final, NOTHING
        self.measure(row)
        self.changed = True

    def lengthen(self, row: Row, length: int) -> None:
        """Let the sequence in a row become longer."""
        self.live_bytes += self.bytes_for(length) - self.bytes_for(row.length)
        row.length = length
        if length > row.enough_until or length > row.final:
            self.measure(row)

    def vacate(self, row: Row) -> None:
        """A row is not in use any more; all that is mapped in it stays."""
        self.live_bytes -= self.bytes_for(row.length)
        self.sums = self.sums.replaced(row.marks, NOTHING)
        self.with_surplus.pop(row.index, None)
        if row.seq_id is not None:
            self.live.pop(row.seq_id, None)  # a cached row is not live
        row.seq_id, row.length, row.final, row.marks = None, 0, 0, NOTHING
        self.changed = True

    def count_shared(self, page_groups: int) -> None:
        """Correct the sums for page-groups that one more row in use owns (one less, if negative)."""
        size = page_groups * self.geometries[0].page_group
        self.shared += page_groups
        self.live_bytes -= size
        self.sums = self.sums.replaced(Marks(page_groups, page_groups, size, size), NOTHING)

    def measure(self, row: Row) -> None:
        """Bring the sums up to date after a row in use has changed."""
        before = row.marks
        row.measure(self.geometries, self.max_tokens)
        self.sums = self.sums.replaced(before, row.marks)
        if row.surplus:
            self.with_surplus[row.index] = row
        else:
            self.with_surplus.pop(row.index, None)

    # ---- mapping -----------------------------------------------------------------------------------------------

    def map(self, row: Row, length: int, actions: list[Action]) -> None:
        """Map what a row in use lacks for `length` tokens from what is free."""
        self.attach(row, self.in_each_tensor(length), actions)
        self.measure(row)

    def in_each_tensor(self, length: int) -> list[int]:
        """Page-groups of each tensor, by layer group; a row ends at `max_tokens`."""
        return [g.page_groups_for(min(length, self.max_tokens)) for g in self.geometries]

    def attach(self, row: Row, want: Seq[int], actions: list[Action]) -> None:
        """Map free page-groups at the end of a row, until it has `want` by layer group."""
        for group, (mapped, g) in enumerate(zip(row.page_groups, self.geometries, strict=True)):
            while len(mapped) < want[group]:
                page_group = self.pools[group].take(after=mapped[-1] if mapped else None)
                self.free -= g.num_tensors
                row.mapped += g.num_tensors
                actions.append(Map(group, row.index, len(mapped), page_group))
                mapped.append(page_group)

    def trim(self, row: Row, keep: Seq[int], wanted: int, actions: list[Action]) -> None:
        """Unmap a row's last page-groups, `keep` by layer group excepted, until `wanted` are free."""
        for group, mapped in enumerate(row.page_groups):
            while len(mapped) > keep[group] and self.free < wanted:
                self.unmap_last(row, group, actions)

    def unmap_last(self, row: Row, group: int, actions: list[Action], *, foreign: int = 0) -> None:
        """Unmap a row's last page-group; it is free again, unless it is one of the first, `foreign` ones."""
        mapped, tensors = row.page_groups[group], self.geometries[group].num_tensors
        page_group = mapped.pop()
        row.mapped -= tensors
        actions.append(Unmap(group, row.index, len(mapped), page_group))
        if len(mapped) >= foreign:
            self.pools[group].give(page_group)
            self.free += tensors

    # ---- recounting --------------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Recount page-groups, rows and sums. Raises IntegrityError with what differs."""
        for group, pool in enumerate(self.pools):
            pool.check_integrity(page_group for row in self.all for page_group in row.owned(group))
        mapped = [self.over_tensors(map(len, row.page_groups)) for row in self.all]
        expect("page-groups by row", [row.mapped for row in self.all], mapped)
        owned = sum(self.over_tensors([len(row.owned(g)) for g in range(len(self.pools))]) for row in self.all)
        expect("page-groups mapped + free, shared ones once", owned - self.shared + self.free, self.total)
        expect("page-groups free are none or more", self.free >= 0, True)
        used = [row for row in self.all if row.seq_id is not None]
        for row in used:
            fits = self.missing(row, row.length) == 0 and row.length <= row.capacity
            expect(f"row {row.index} holds its {row.length} tokens", fits, True)
        needed = sum(self.page_groups_for(row.length) for row in used)
        expect("page-groups that rows in use need", self.sums.needed, needed - self.shared)

    def recounted_leaves(self) -> tuple[int, ...]:
        """live, reserved, over_estimate, rounding, retained: row by row, in bytes, what rows share in one of them."""
        size = self.geometries[0].page_group
        foreign = sum(self.over_tensors(row.foreign) for row in self.all if row.foreign)
        sums = [-self.shared * size, 0, 0, 0, -foreign * size]
        for row in self.all:
            for g, mapped in zip(self.geometries, row.page_groups, strict=True):
                final = g.resident_bytes(row.final)
                end = g.page_groups_for(row.final) * g.page_group
                leaves = extent_usage(g.resident_bytes(row.length), final, final, end, len(mapped) * g.page_group)
                sums = [total + g.num_tensors * leaf for total, leaf in zip(sums, leaves, strict=True)]
        return tuple(sums)
