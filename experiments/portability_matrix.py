"""`./run.sh kernels`: which kernel each allocator can use unchanged. The matrix itself is a result."""

from rich.console import Console
from rich.table import Table

from kvarena.allocators.registry import ALLOCATORS, memory_layout
from kvarena.kernels.registry import fits, kernel_names, kernel_spec, missing


def print_matrix() -> None:
    """Print allocators x kernels, and what each kernel reads."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)  # a file or a pipe has no width to fit
    console.print(_pairs())
    console.print(_kernels())


def _pairs() -> Table:
    table = Table(title="Which kernel reads which allocator's memory", title_justify="left")
    table.add_column("allocator")
    table.add_column("layout")
    for name in kernel_names():
        table.add_column(name, justify="center")
    for allocator in ALLOCATORS:
        layout = memory_layout(allocator)
        table.add_row(
            allocator, layout, *("yes" if fits(kernel_spec(k), layout) is None else "-" for k in kernel_names())
        )
    return table


def _kernels() -> Table:
    table = Table(title="What a kernel can read", title_justify="left")
    for column in ("kernel", "body", "library", "layouts", "devices", "dtypes", "head sizes", "block sizes", "here"):
        table.add_column(column)
    for name in kernel_names():
        spec = kernel_spec(name)
        table.add_row(
            name, spec.body, spec.library, _listed(spec.layouts), _listed(spec.devices), _listed(spec.dtypes),
            _listed(spec.head_sizes), _listed(spec.block_sizes), missing(spec) or "installed",
        )  # fmt: skip
    return table


def _listed(values: frozenset[int] | frozenset[str] | None) -> str:
    if values is None:
        return "any"
    return ", ".join(str(value) for value in sorted(values)) if len(values) < 7 else f"{min(values)} to {max(values)}"
