"""Which kernel can read which allocator's memory: the refusal of a pair that cannot, with the pairs that can."""

from collections.abc import Iterable

from kvarena.allocators.options import option
from kvarena.allocators.registry import allocator_names, memory_layout
from kvarena.errors import UserError
from kvarena.harness.model import ModelConfig
from kvarena.harness.run.systems import System
from kvarena.kernels.registry import fits, kernel_names, kernel_spec


def check_fit(systems: Iterable[System], model: ModelConfig | None = None, device: str | None = None) -> None:
    """Raises UserError where a system's kernel cannot read its allocator's layout, this model, or on this device.

    Under a modelled clock neither a model nor a device is there to ask of: the layout alone is.
    """
    for system in systems:
        size = _block_size(system) if model else None
        reason = misfit(system.allocator.name, system.kernel.name, model, device, size)
        if reason is not None:
            raise UserError(
                f"{system.allocator.name} + {system.kernel.name}: kernel {system.kernel.name} {reason}. "
                f"Pairs that fit: {', '.join(fitting_pairs(model, device))}"
            )


def misfit(
    allocator: str, kernel: str, model: ModelConfig | None, device: str | None, block_size: int | None = None
) -> str | None:
    """Why the kernel cannot serve the allocator, None where it can. What is not given is not asked."""
    dtype, head_size = (model.dtype, model.head_size) if model else (None, None)
    return fits(kernel_spec(kernel), memory_layout(allocator), device, dtype, head_size, block_size)


def fitting_pairs(model: ModelConfig | None, device: str | None) -> list[str]:
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
