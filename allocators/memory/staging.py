"""Integers on their way to a device: pinned memory, an asynchronous copy, no wait; and how many blocks go at a time.

Torch's allocator of pinned memory keeps a buffer back until the copies out of it are done, so a fresh one each time
is both cheap and safe to fill at once.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvarena.allocators.sizes import MB

_BATCH_BYTES = 64 * MB  # device memory that a batch of copied blocks may take, beside a pool that takes the rest


def staging_buffer(num_words: int, device: torch.device) -> tuple[Tensor, npt.NDArray[np.int32]]:
    """An int32 buffer on the host from which `device` can copy while the host goes on; also as an array to fill."""
    buffer = torch.empty(num_words, dtype=torch.int32, pin_memory=device.type == "cuda")
    return buffer, buffer.numpy()


def indices_on(device: torch.device, indices: Sequence[int]) -> Tensor:
    """Indices as an int64 tensor on `device`."""
    buffer, words = staging_buffer(2 * len(indices), device)
    words.view(np.int64)[:] = indices
    return buffer.to(device, non_blocking=True).view(torch.int64)


def batches_of_blocks(blocks: Tensor, count: int) -> Iterator[slice]:
    """Slices of `count` blocks like those of `blocks` ([N, ...]), each small enough to be gathered at once."""
    size = max(1, _BATCH_BYTES // (blocks[0].numel() * blocks.dtype.itemsize))
    return (slice(start, start + size) for start in range(0, count, size))
