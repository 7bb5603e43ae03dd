"""Which kernel can read which allocator's memory: the refusal of a pair that cannot, with the pairs that can."""

from collections.abc import Iterable

from kvarena.allocators.options import option
from kvarena.allocators.registry import allocator_names, memory_layout
from kvarena.errors import UserError
from kvarena.harness.model import ModelConfig
from kvarena.harness.run.systems import System
from kvarena.kernels.registry import fits, kernel_names, kernel_spec


def check_fit(systems: Iterable[System], model: ModelConfig, device: str) -> None:
    """Raises UserError where a system's kernel cannot read its allocator's layout, this model, or on this device."""
    for system in systems:
        reason = misfit(system.allocator.name, system.kernel.name, model, device, _block_size(system))
        if reason is not None:
            raise UserError(
                f"{system.allocator.name} + {system.kernel.name}: kernel {system.kernel.name} {reason}. "
                f"Pairs that fit: {', '.join(fitting_pairs(model, device))}"
            )


def misfit(allocator: str, kernel: str, model: ModelConfig, device: str, block_size: int | None = None) -> str | None:
    """Why the kernel cannot serve the allocator, None where it can."""
    layout = memory_layout(allocator)
    return fits(kernel_spec(kernel), layout, device, model.dtype, model.head_size, block_size)


def fitting_pairs(model: ModelConfig, device: str) -> list[str]:
    """Every pair that fits, as `allocator + kernel`."""
    return [
        f"{allocator} + {kernel}"
        for allocator in allocator_names()
        for kernel in kernel_names()
        if misfit(allocator, kernel, model, device) is None
    ]


def _block_size(system: System) -> int | None:
    size: int | None = option(system.allocator, "block_size")
    return size
