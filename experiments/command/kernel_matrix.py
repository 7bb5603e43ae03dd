"""`./run.sh kernels`: which kernel each allocator can use unchanged. The matrix itself is a result."""

from rich.console import Console

from kvarena.allocators.registry import allocator_names, memory_layout
from kvarena.experiments.kit.tables import Grid, print_grid
from kvarena.kernels.registry import fits, kernel_names, kernel_spec, missing


def print_matrix() -> None:
    """Print allocators x kernels, and what each kernel reads."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)  # a file or a pipe has no width to fit
    _print_pairs(console)
    _print_kernels(console)


def _print_pairs(console: Console) -> None:
    layouts = {allocator: memory_layout(allocator) for allocator in allocator_names()}
    cells = {(allocator, "layout"): str(layout) for allocator, layout in layouts.items()}
    for kernel in kernel_names():
        for allocator, layout in layouts.items():
            cells[allocator, kernel] = "yes" if fits(kernel_spec(kernel), layout) is None else "-"
    heads = ["layout", *kernel_names()]
    print_grid(console, "Which kernel reads which allocator's memory", Grid("allocator", list(layouts), heads, cells))


def _print_kernels(console: Console) -> None:
    cells = dict[tuple[str, str], str]()
    for name in kernel_names():
        spec = kernel_spec(name)
        reads = {
            "body": spec.body, "library": spec.library, "layouts": _listed(spec.layouts),
            "devices": _listed(spec.devices), "dtypes": _listed(spec.dtypes), "head sizes": _listed(spec.head_sizes),
            "block sizes": _listed(spec.block_sizes), "here": missing(spec) or "installed",
        }  # fmt: skip
        cells |= {(name, what): text for what, text in reads.items()}
    heads = list(dict.fromkeys(what for _, what in cells))
    print_grid(console, "What a kernel can read", Grid("kernel", kernel_names(), heads, cells), "left")


def _listed(values: frozenset[int] | frozenset[str] | None) -> str:
    if values is None:
        return "any"
    return ", ".join(str(value) for value in sorted(values)) if len(values) < 7 else f"{min(values)} to {max(values)}"
