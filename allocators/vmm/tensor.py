"""Torch tensors over reserved addresses."""

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kvarena.allocators.vmm.dlpack import bytes_at
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
    span = _host_bytes(driver, base, span_bytes) if driver.device == "cpu" else _gpu_bytes(driver, base, span_bytes)
    strides = tuple(stride // dtype.itemsize for stride in strides_bytes)
    return span.view(dtype).as_strided(tuple(shape), strides)


def _host_bytes(driver: Driver, base: int, num_bytes: int) -> Tensor:
    buffer = (ctypes.c_char * num_bytes).from_address(base)
    buffer.driver = driver  # type: ignore[attr-defined]  # the buffer outlives no driver
    return torch.frombuffer(buffer, dtype=torch.uint8)


def _gpu_bytes(driver: Driver, base: int, num_bytes: int) -> Tensor:
    """Through DLPack; through the CUDA array interface where this torch will not have it.

    Some versions of torch ask the driver whose the address of a CUDA array is, which fails as long as nothing is
    mapped there; with DLPack they take our word.
    """
    device = torch.device(driver.device, driver.ordinal)
    torch.cuda.init()  # type: ignore[no-untyped-call]
    try:
        return bytes_at(base, num_bytes, device, driver)
    except (RuntimeError, ValueError, BufferError, NotImplementedError):
        tensor = torch.as_tensor(_CudaArray(driver, base, num_bytes), device=device)
    if tensor.data_ptr() != base:
        raise RuntimeError(f"torch {torch.__version__} copies a tensor over {driver.device} addresses")
    return tensor


class _CudaArray:
    """Bytes at an address, as the CUDA array interface describes them."""

    def __init__(self, driver: Driver, base: int, num_bytes: int) -> None:
        self.driver = driver  # torch keeps this object, and so the memory, alive
        self.__cuda_array_interface__ = {"version": 3, "typestr": "|u1", "shape": (num_bytes,), "data": (base, False)}
