"""The portability matrix: which kernels each allocator can use unchanged.

It is a result and not only a check: that a virtually contiguous cache may use any kernel written for contiguous
memory is the main claim of vAttention (sections 1 and 8). Allocators come as names with their layouts, since
kernels know nothing of allocators.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from rich.table import Table

from kvarena.errors import UserError
from kvarena.kernels.catalogue import CATALOGUE
from kvarena.kernels.layout import Layout
from kvarena.kernels.registry import fits, kernel_spec, missing


class Pair(NamedTuple):
    """One cell of the matrix."""

    allocator: str
    layout: Layout
    kernel: str
    reason: str | None  # why the kernel cannot read the allocator's memory; None: it can, unchanged
    missing: str | None  # what this environment lacks to run it


def matrix(
    allocators: Mapping[str, Layout],
    kernels: Iterable[str] = tuple(CATALOGUE),
    device: str | None = None,
    dtype: str | None = None,
    head_size: int | None = None,
    block_sizes: Mapping[str, int] | None = None,
) -> list[Pair]:
    """Every allocator with every kernel. What is not given is not asked; `block_sizes` is by allocator."""
    sizes = block_sizes or {}
    return [
        Pair(
            allocator,
            layout,
            kernel,
            fits(kernel_spec(kernel), layout, device, dtype, head_size, sizes.get(allocator)),
            missing(kernel_spec(kernel)),
        )
        for allocator, layout in allocators.items()
        for kernel in kernels
    ]


def check(pairs: Iterable[Pair], allocator: str, kernel: str) -> None:
    """Refuse a pair that does not fit. Raises UserError with the pairs that do."""
    listed = list(pairs)
    for pair in listed:
        if (pair.allocator, pair.kernel) == (allocator, kernel) and pair.reason:
            good = ", ".join(f"{p.allocator} + {p.kernel}" for p in listed if p.reason is None) or "none"
            raise UserError(f"allocator={allocator} kernel={kernel}: {kernel} {pair.reason}. Pairs that fit: {good}")


def render(pairs: Iterable[Pair]) -> Table:
    """Show the matrix: a line per kernel, a column per allocator."""
    listed = list(pairs)
    columns = dict.fromkeys((pair.allocator, pair.layout) for pair in listed)
    table = Table("kernel", "library", *(f"{allocator}\n[dim]{layout}[/dim]" for allocator, layout in columns))
    for kernel in dict.fromkeys(pair.kernel for pair in listed):
        cells = {pair.allocator: pair for pair in listed if pair.kernel == kernel}
        shown = (_cell(cells[allocator]) if allocator in cells else "" for allocator, _ in columns)
        table.add_row(kernel, kernel_spec(kernel).library, *shown)
    return table


def _cell(pair: Pair) -> str:
    if pair.reason is not None:
        return f"[red]no[/red]: {pair.reason}"
    return "[green]yes[/green]" + (f" ({pair.missing})" if pair.missing else "")
