"""Torch tensors over reserved addresses."""

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kvarena.allocators.vmm.driver import Driver


def strided_tensor(
    driver: Driver, base: int, dtype: torch.dtype, shape: Sequence[int], strides_bytes: Sequence[int]
) -> Tensor:
    """Tensor over the addresses from `base` on; touching an element that is not mapped is a segmentation fault.

    The tensor keeps the driver, and so its memory, alive; after `driver.close()` it must not be touched.
    """
    if driver.device != "cpu":
        raise NotImplementedError(f"tensors over addresses of {driver.device}")
    span_bytes = dtype.itemsize + sum((n - 1) * stride for n, stride in zip(shape, strides_bytes, strict=True))
    if any(stride % dtype.itemsize for stride in strides_bytes) or math.prod(shape) == 0:
        raise ValueError(f"no tensor of shape {tuple(shape)}, strides {tuple(strides_bytes)} bytes, {dtype}")
    buffer = (ctypes.c_char * span_bytes).from_address(base)
    buffer.driver = driver  # type: ignore[attr-defined]  # the buffer outlives no driver
    flat = torch.frombuffer(buffer, dtype=dtype)
    return flat.as_strided(tuple(shape), tuple(stride // dtype.itemsize for stride in strides_bytes))
