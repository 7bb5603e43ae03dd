"""`cuda.bindings.driver`, with every result checked and one device's primary context current in every thread."""

import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from kvarena.allocators.vmm.driver import DriverError
from kvarena.errors import UserError


class CudaError(DriverError):
    """A driver call returned something else than CUDA_SUCCESS; `result` is its name."""

    def __init__(self, function: str, result: Any) -> None:
        self.result: str = getattr(result, "name", str(result))
        super().__init__(f"{function} failed: {self.result}")


class CudaContext:
    """The primary context of one GPU: the one that torch works in. `context("cuMemCreate", ...)` is a checked call."""

    def __init__(self, ordinal: int = 0, api: Any = None) -> None:
        """`api` stands for `cuda.bindings.driver`. Raises UserError where there is no driver, or no such GPU."""
        self.api = api if api is not None else _bindings()
        self._threads = threading.local()
        try:
            self._checked("cuInit", 0)
            self.device = self._checked("cuDeviceGet", ordinal)
            self._primary = self._checked("cuDevicePrimaryCtxRetain", self.device)
        except RuntimeError as error:  # a CudaError, or what the bindings raise where libcuda is not installed
            raise UserError(f"device=cuda: no CUDA driver, or no GPU {ordinal} to be had, here ({error})") from error

    def __call__(self, function: str, *arguments: Any) -> Any:
        """Call a function of the driver in this context. Raises CudaError with the name of what it returned."""
        self.enter()
        return self._checked(function, *arguments)

    def enter(self) -> None:
        """Make this context the current one of this thread."""
        if not getattr(self._threads, "entered", False):
            self._checked("cuCtxSetCurrent", self._primary)
            self._threads.entered = True

    def free_and_total_bytes(self) -> tuple[int, int]:
        """Memory of the GPU, whoever uses it."""
        free, total = self("cuMemGetInfo")
        return int(free), int(total)

    def release(self) -> None:
        """Let go of the context; torch keeps it alive as long as it needs it. Raises CudaError where that failed."""
        for error in self.give_back([("cuDevicePrimaryCtxRelease", self.device)]):
            raise error

    def give_back(self, calls: Iterable[tuple[Any, ...]]) -> list[CudaError]:
        """Make every one of these calls, and once more, in order, those that failed; returns how they failed at first.

        What failed once may have kept others from succeeding: no range is freed before all of it is unmapped.
        """
        failed: list[tuple[tuple[Any, ...], CudaError]] = []
        for call in calls:
            try:
                self(*call)
            except CudaError as error:
                failed.append((call, error))
        for call, _ in failed:
            with suppress(CudaError):
                self(*call)
        return [error for _, error in failed]

    def _checked(self, function: str, *arguments: Any) -> Any:
        result, *values = getattr(self.api, function)(*arguments)
        if result != self.api.CUresult.CUDA_SUCCESS:
            raise CudaError(function, result)
        return values[0] if len(values) == 1 else values


def _bindings() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise UserError("device=cuda needs the package cuda-bindings: pip install 'kvarena[gpu]'") from error
    return driver
