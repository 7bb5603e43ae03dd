"""Torch tensors over reserved addresses."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kvarena.allocators.vmm.driver import Driver


def strided_tensor(
    driver: Driver, base: int, dtype: torch.dtype, shape: Sequence[int], strides_bytes: Sequence[int]
) -> Tensor:
    """Tensor over the addresses from `base` on; touching an element that is not mapped is a fault: SIGSEGV on the
    host, an illegal address on a GPU, whose context is lost then.

    The tensor keeps the driver, and so its memory, alive; after `driver.close()` it must not be touched. Raises
    ValueError for an empty tensor, and for strides that are no multiple of the element's size.
    """
    span_bytes = dtype.itemsize + sum((n - 1) * stride for n, stride in zip(shape, strides_bytes, strict=True))
    if any(stride % dtype.itemsize for stride in strides_bytes) or math.prod(shape) == 0:
        raise ValueError(f"no tensor of shape {tuple(shape)}, strides {tuple(strides_bytes)} bytes, {dtype}")
    device = torch.device(driver.device, driver.ordinal) if driver.device == "cuda" else torch.device(driver.device)
    strides = tuple(stride // dtype.itemsize for stride in strides_bytes)
    return bytes_at(base, span_bytes, device, driver).view(dtype).as_strided(tuple(shape), strides)


def bytes_at(address: int, num_bytes: int, device: torch.device, owner: object) -> Tensor:
    """[num_bytes] uint8 over an address of `device`; keeps `owner` alive as long as the tensor and its views.

    Torch takes our word for the address. Its other ways do not do: the CUDA array interface asks the driver whose the
    address is, which fails as long as nothing is mapped there; DLPack tells of a tensor's end through a callback, and
    one in Python loses the exception that the tensor may be dying of. An attribute of a storage lives as long as it.
    """
    span = torch.empty(0, dtype=torch.uint8, device=device)
    storage = torch._C._construct_storage_from_data_pointer(address, span.device, num_bytes)  # of a numbered GPU
    storage.owner = owner  # type: ignore[attr-defined]  # one more
    return span.set_(storage)
