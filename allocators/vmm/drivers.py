"""The driver of a device."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from kvarena.allocators.vmm.cuda import CudaDriver, granularity_of_gpu
from kvarena.allocators.vmm.cuda_context import CudaContext
from kvarena.allocators.vmm.driver import Driver
from kvarena.allocators.vmm.host import AnonymousDriver, HostDriver, no_memfd
from kvarena.errors import UserError


def make_driver(device: torch.device | str, page_group_bytes: int) -> Driver:
    """A driver of page-groups of this size. Raises UserError where the device has none, or none of this size."""
    device = torch.device(device)
    if _is_cpu(device):
        return HostDriver(page_group_bytes)
    return CudaDriver(page_group_bytes, device.index or 0)


def make_driver_of_one(device: torch.device | str, num_bytes: int) -> Driver:
    """A driver of one page-group that is mapped once. Such needs no memfd; said where there is none."""
    if _is_cpu(torch.device(device)) and sys.platform == "linux" and (why := no_memfd(num_bytes)):
        _say(f"resident pools lie in anonymous memory, for {why}")
        return AnonymousDriver(num_bytes)
    return make_driver(device, num_bytes)


@cache
def _say(what: str) -> None:
    print(what, file=sys.stderr)


@contextmanager
def lasting_context(device: torch.device | str) -> Iterator[None]:
    """Keep a GPU's context meanwhile: else the last driver to close takes it down, and the next makes it anew."""
    device = torch.device(device)
    context = None if _is_cpu(device) else CudaContext(device.index or 0)
    try:
        yield
    finally:
        if context is not None:
            context.release()


def granularity_of(device: torch.device | str) -> int:
    """Bytes of which every page-group on a device is a multiple. Raises UserError where it has no driver."""
    device = torch.device(device)
    return HostDriver.granularity if _is_cpu(device) else granularity_of_gpu(device.index or 0)


def _is_cpu(device: torch.device) -> bool:
    """Whether the host's driver serves it. Raises UserError where it is neither the CPU nor a GPU at hand."""
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device={device}: there is a virtual-memory driver for cpu and for cuda only")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={device}: torch sees no CUDA GPU here. device=cpu runs everything for real on the CPU")
    return device.type == "cpu"
