"""Page-groups (section 5): how a row of a virtual tensor lies in them, and which of them are free.

A layer group has `num_tensors` tensors; in each of them a row holds its sequence's tokens at a constant stride, and
begins at a page-group. All tensors of a group grow in step, so one number stands for a page-group in each of them.

    one tensor, one row          page-group 0        page-group 1        page-group 2
    stride 3/8 of a page-group   |0..|1..|2.    .|3..|4..|5..|6..|7..|   |           |   token 2 straddles two

    plain      2 tensors a layer, K and V: stride = bytes of a token in one layer
    sliced     one K and one V tensor over all N layers (section 8.2): stride = N times as much, N times fewer tensors

Page-groups needed are counted in bytes, not in tokens per page-group: rounding tokens down (as the paper's artifact
does) maps more than it must wherever a token straddles.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import gcd

from kvarena.allocators.integrity import IntegrityError
from kvarena.allocators.kv_layout import KVLayout, LayerGroup
from kvarena.allocators.sizes import KB, MB, format_bytes, parse_bytes, round_up
from kvarena.errors import UserError

PAGE_GROUPS = (64 * KB, 128 * KB, 256 * KB, 2 * MB)  # section 6.2: those of the authors' driver, and of stock CUDA


@dataclass(frozen=True, slots=True)
class RowGeometry:
    """Rows of one layer group."""

    num_tensors: int
    token_stride: int  # bytes from one token to the next in one tensor
    page_group: int  # bytes
    window: int | None  # tokens of the ring, where the layers only see a window
    read_past: int = 0  # tokens past a sequence's end that a kernel may touch, so that they must be mapped too

    def resident_bytes(self, length: int) -> int:
        """Bytes in one tensor that a sequence of `length` tokens occupies."""
        return self.token_stride * (length if self.window is None else min(length, self.window))

    def page_groups_for(self, length: int) -> int:
        """Page-groups of each tensor that hold a sequence of `length` tokens, and what may be read past its end."""
        if self.window is not None:
            length = min(length, self.window)
        if self.read_past and length:
            length += self.read_past
        return -(-self.token_stride * length // self.page_group)

    def full_page_groups(self, length: int) -> int:
        """Page-groups of each tensor that lie wholly below so many tokens: never written again; of a ring none."""
        return self.resident_bytes(length) // self.page_group if self.window is None else 0

    def tokens_in(self, page_groups: int, max_tokens: int) -> int:
        """Longest sequence, up to `max_tokens`, that so many page-groups hold; a complete ring holds any."""
        tokens = page_groups * self.page_group // self.token_stride
        if self.read_past:
            tokens = max(0, tokens - self.read_past)
        if self.window is not None and tokens >= self.window:
            return max_tokens
        return min(tokens, max_tokens)

    def row_bytes(self, max_tokens: int) -> int:
        """Bytes from one row to the next in one tensor: whole page-groups, so that each row can be mapped alone."""
        return round_up(self.resident_bytes(max_tokens) + self.read_past * self.token_stride, self.page_group)


def row_geometry(group: LayerGroup, page_group: int, tensor_slicing: bool, read_past: int = 0) -> RowGeometry:
    """Geometry of a layer group, plain or sliced."""
    layers = group.num_layers if tensor_slicing else 1  # that share a tensor
    return RowGeometry(group.num_tensors // layers, group.token_bytes * layers, page_group, group.window, read_past)


def row_geometries(
    kv_layout: KVLayout, page_group: int, tensor_slicing: bool, read_past: int = 0
) -> tuple[RowGeometry, ...]:
    """Geometry of every layer group."""
    return tuple(row_geometry(group, page_group, tensor_slicing, read_past) for group in kv_layout.groups)


def checked_page_group(page_group: int | str) -> int:
    """Bytes of a page-group. Raises UserError where no driver has that size."""
    size = parse_bytes(page_group, "allocator.page_group")
    if size not in PAGE_GROUPS:
        allowed = ", ".join(map(format_bytes, PAGE_GROUPS))
        raise UserError(f"allocator.page_group={page_group}: no driver has that size. There are: {allowed}")
    return size


def page_groups_of(pool_bytes: int, geometries: Sequence[RowGeometry]) -> int:
    """Page-groups of a pool that can be used: with one layer group, as many in each tensor.

    Raises UserError where there is not one for each tensor.
    """
    size, tensors = geometries[0].page_group, [g.num_tensors for g in geometries]
    page_groups = pool_bytes // size // gcd(*tensors) * gcd(*tensors)
    if page_groups < sum(tensors):
        raise UserError(
            f"allocator vattention: a pool of {pool_bytes} bytes does not hold one page-group of {format_bytes(size)} "
            f"in each of {sum(tensors)} tensors; use a smaller allocator.page_group, allocator.tensor_slicing=true, "
            "or a larger pool"
        )
    return page_groups


class PageGroupPool:
    """Numbers of free page-groups, last in first out, ascending where it can: neighbours are mapped by one call."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._first_unused = 0  # those from here on were never taken
        self._returned: dict[int, None] = {}  # a set that remembers its order

    def __len__(self) -> int:
        return self.size - self._first_unused + len(self._returned)

    def take(self, after: int | None) -> int:
        """Take the page-group that follows `after`, or else the one given back last, or else a new one."""
        follower = -1 if after is None else after + 1
        if follower in self._returned:
            del self._returned[follower]
            return follower
        all_used = self._first_unused == self.size
        if self._returned and (all_used or follower != self._first_unused):
            return self._returned.popitem()[0]
        if all_used:
            raise IntegrityError(f"a page-group was taken when none of {self.size} was free")
        self._first_unused += 1
        return self._first_unused - 1

    def give(self, page_group: int) -> None:
        """Give a page-group back."""
        if page_group in self._returned or not 0 <= page_group < self._first_unused:
            raise IntegrityError(f"page-group {page_group} was given back, but is free")
        self._returned[page_group] = None

    def check_integrity(self, owned: Iterable[int]) -> None:
        """Check that `owned` are all the page-groups that are not free."""
        taken = [page_group for page_group in range(self._first_unused) if page_group not in self._returned]
        if sorted(set(owned)) != taken:
            raise IntegrityError(f"page-groups in rows {sorted(set(owned))}, page-groups not free {taken}")
