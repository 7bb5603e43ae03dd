"""The machine's own limit, measured beside every cell: how fast it can only read."""

from collections.abc import Callable

import numpy as np
import torch

from kvarena.harness.measured.timed_call import seconds

READ_BYTES = 256 << 20  # several times any last-level cache
GPU_READ_BYTES = 2 << 30  # half a millisecond on the fastest GPU: launching it weighs nothing


class StreamingRead:
    """A read-only reduction over a buffer larger than the cache, on one thread (CPU) or the whole GPU."""

    def __init__(self, device: torch.device, num_bytes: int | None = None) -> None:
        on_gpu = device.type == "cuda"
        self._bytes = num_bytes or (GPU_READ_BYTES if on_gpu else READ_BYTES)
        self._device = device
        if on_gpu:
            values = torch.ones(self._bytes // 4, device=device)
            self._read: Callable[[], object] = values.sum
        else:
            from kvarena.harness.measured.host_sum import host_sum  # no GPU loads numba for it

            array = np.ones(self._bytes // 4, np.float32)
            self._read = lambda: host_sum(array)
        self._read()

    def gb_per_s(self, repetitions: int = 3) -> float:
        """Best of a few readings, in 1e9 bytes per second: the limit is what the machine can do undisturbed."""
        return max(self._once() for _ in range(repetitions))

    def _once(self) -> float:
        return self._bytes / seconds(self._read, self._device) / 1e9
