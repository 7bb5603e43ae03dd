"""The CUDA driver: page-groups of GPU memory, through the driver's virtual memory management.

    reserve   cuMemAddressReserve
    create    cuMemCreate, once for each page-group: physical memory without an address
    map       cuMemMap, once for each, then one cuMemSetAccess over the whole run: mapped memory starts inaccessible;
              many runs are one call of a compiled loop (`cuda_loop.py`)
    unmap     cuMemUnmap, once over the run: its range may span several whole mappings
    clear     cuMemsetD8 over the run, and a wait
    release   cuMemRelease, once for each
    free      cuMemAddressFree

None of these waits for kernels. Whoever unmaps must first wait for every kernel launched that may read the addresses
(`vattention/kernel_fence.py`); mapping touches only addresses that no kernel reads yet, so it may run beside them.
`close` waits for all.

A handle of ours is the number of a page-group, ascending; the driver's own handles are opaque.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from time import perf_counter_ns
from typing import Any, NoReturn

import numpy as np

from kvarena.allocators.sizes import format_bytes
from kvarena.allocators.vmm.cuda_context import CudaContext, CudaError
from kvarena.allocators.vmm.driver import AddressRange, Driver, DriverError, MapRun, OutOfPhysicalMemory
from kvarena.errors import UserError

_OUT_OF_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"


class CudaDriver(Driver):
    """Page-groups of one GPU's memory, multiples of the driver's granularity: 2 MB on every GPU so far."""

    device = "cuda"
    new_memory_is_zero = False  # not promised

    def __init__(self, page_group_bytes: int, ordinal: int = 0, api: Any = None) -> None:
        """`api` stands for `cuda.bindings.driver`. Raises UserError where there is no GPU, or it has no such memory."""
        self.ordinal = ordinal
        self._cuda = CudaContext(ordinal, api)
        try:
            self._properties = _pinned_memory_of(self._cuda.api, ordinal)
            self._access = _read_and_write(self._cuda.api, ordinal)
            self.granularity = _granularity(self._cuda, self._properties)
            if 0 < page_group_bytes < self.granularity:
                raise UserError(_too_small(page_group_bytes, self.granularity))
            super().__init__(page_group_bytes)
            self._free_at_start, _ = self._cuda.free_and_total_bytes()
        except BaseException:
            self._cuda.release()
            raise
        self._loop: Callable[..., int] | None = None
        self._own_api = api is not None  # which the loop, that calls the library, would pass by
        self._handles: dict[int, Any] = {}  # number of a page-group -> the driver's handle
        self._next_handle = 0
        # Runs at close(), or when the last tensor over our addresses is gone; at exit the system does it.
        self._give_back = weakref.finalize(self, _give_back, self._cuda, self._ranges, self._handles, page_group_bytes)
        self._give_back.atexit = False

    def counted_bytes(self) -> int:
        """Bytes behind the handles that the driver gave us and has not taken back."""
        return len(self._handles) * self.page_group_bytes

    def taken_bytes(self) -> int:
        """Memory that the GPU has lost since this driver was made, to whomever: cuMemGetInfo's view of the above."""
        free, _ = self._cuda.free_and_total_bytes()
        return self._free_at_start - free

    def idle(self) -> None:
        """Ask for the driver's version."""
        self._call("idle", "cuDriverGetVersion")

    def _reserve(self, num_bytes: int) -> int:
        return int(self._call("reserve", "cuMemAddressReserve", num_bytes, self.granularity, 0, 0))

    def _create(self, count: int) -> list[int]:
        numbers = range(self._next_handle, self._next_handle + count)
        self._next_handle += count
        try:
            for number in numbers:
                handle = self._call("create", "cuMemCreate", self.page_group_bytes, self._properties, 0)
                self._handles[number] = handle
        except BaseException:
            for number in numbers:
                if number in self._handles:
                    self._release_one(number)
            raise
        return list(numbers)

    def _zero(self, address: int, num_bytes: int) -> None:
        self._call("clear", "cuMemsetD8", address, 0, num_bytes)
        self._call("clear", "cuCtxSynchronize")

    def _map(self, addresses: AddressRange, slot: int, handles: Sequence[int]) -> None:
        start, size, mapped = self._address(addresses, slot), self.page_group_bytes, 0
        try:
            for handle in handles:
                self._call("map", "cuMemMap", start + mapped, size, 0, self._handles[handle], 0)
                mapped += size
            self._call("set_access", "cuMemSetAccess", start, mapped, [self._access], 1)
        except BaseException:
            if mapped:
                self._call("unmap", "cuMemUnmap", start, mapped)
            raise

    def prepare(self) -> None:
        """Load the compiled loop, where there is a numba, one that fits this numpy, to compile it."""
        if not self._own_api:
            with suppress(ImportError):
                from kvarena.allocators.vmm.cuda_loop import cuda_loop

                self._loop = cuda_loop()

    def map_runs(self, runs: Sequence[MapRun]) -> None:
        """Map several runs, in order: all of them, or none. One call, without the interpreter's lock."""
        if self._loop is None:
            return super().map_runs(runs)
        entered: list[tuple[AddressRange, int, Sequence[int]]] = []
        try:
            for run in runs:
                addresses, slot = self._mappable(*run)
                self._enter(addresses, slot, run.handles)  # a later run may want the same
                entered.append((addresses, slot, run.handles))
            self._map_at_once(self._loop, entered)
        except BaseException:
            for addresses, slot, handles in entered:
                self._strike(addresses, slot, len(handles))
            raise
        return None

    def _map_at_once(self, loop: Callable[..., int], runs: Sequence[tuple[AddressRange, int, Sequence[int]]]) -> None:
        from kvarena.allocators.vmm.cuda_loop import rows

        size, addresses, run_ends = self.page_group_bytes, [], []
        for where, slot, handles in runs:
            addresses += [self._address(where, slot + i) for i in range(len(handles))]
            run_ends += [0] * (len(handles) - 1) + [size * len(handles)]
        numbers = [int(self._handles[handle]) for _, _, handles in runs for handle in handles]
        groups, done = rows(addresses, numbers, run_ends), np.zeros(2, dtype=np.int64)
        self._cuda.enter()
        started_ns = perf_counter_ns()
        result = loop(groups, done, size, self._access.getPtr())
        calls, accessible = done.tolist()
        self._count("map", started_ns, calls)
        self._count("set_access", perf_counter_ns(), accessible)
        if not result:
            return
        denied = run_ends[calls - 1] and np.count_nonzero(run_ends[:calls]) == accessible
        function, kind = ("cuMemSetAccess", "set_access") if denied else ("cuMemMap", "map")
        for address in addresses[: calls if denied else calls - 1]:
            self._call("unmap", "cuMemUnmap", address, size)
        self._raise(kind, CudaError(function, self._cuda.api.CUresult(result)))

    def _unmap(self, addresses: AddressRange, slot: int, count: int) -> None:
        self._call("unmap", "cuMemUnmap", self._address(addresses, slot), count * self.page_group_bytes)

    def _release(self, handles: Sequence[int]) -> None:
        """Release one by one: where one fails, those before it are gone for good, and the books say so."""
        for done, handle in enumerate(handles):
            try:
                self._release_one(handle)
            except BaseException:
                for released in handles[:done]:
                    del self._num_maps[released]
                raise

    def _release_one(self, handle: int) -> None:
        self._call("release", "cuMemRelease", self._handles[handle])
        del self._handles[handle]

    def _free(self, addresses: AddressRange) -> None:
        self._call("free", "cuMemAddressFree", addresses.base, addresses.num_slots * self.page_group_bytes)

    def _close(self) -> None:
        failed = self._give_back()
        if failed:
            raise DriverError(f"closing: {len(failed)} calls failed, the first of them {failed[0]}") from failed[0]

    def _address(self, addresses: AddressRange, slot: int) -> int:
        return addresses.base + slot * self.page_group_bytes

    def _call(self, kind: str, function: str, *arguments: Any) -> Any:
        """Make, count and time one call. Running out of memory is an outcome, every other failure an error."""
        started_ns = perf_counter_ns()
        try:
            return self._cuda(function, *arguments)
        except CudaError as error:
            self._raise(kind, error)
        finally:
            self._count(kind, started_ns)

    def _raise(self, kind: str, error: CudaError) -> NoReturn:
        """Running out of memory is an outcome, with what is left; every other failure an error."""
        if error.result != _OUT_OF_MEMORY:
            raise error
        free, total = map(format_bytes, self._cuda.free_and_total_bytes())
        raise OutOfPhysicalMemory(f"{kind}: {error}; {free} of the GPU's {total} is free") from error


def granularity_of_gpu(ordinal: int = 0, api: Any = None) -> int:
    """Bytes of the smallest page-group of a GPU. Raises UserError like `CudaDriver`."""
    cuda = CudaContext(ordinal, api)
    try:
        return _granularity(cuda, _pinned_memory_of(cuda.api, ordinal))
    finally:
        cuda.release()


def _pinned_memory_of(api: Any, ordinal: int) -> Any:
    """Properties of the memory to create: this GPU's, not to be moved."""
    properties = api.CUmemAllocationProp()
    properties.type = api.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = ordinal
    return properties


def _read_and_write(api: Any, ordinal: int) -> Any:
    """The access that mapped memory is given: this GPU reads and writes."""
    access = api.CUmemAccessDesc()
    access.location.type = api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    access.location.id = ordinal
    access.flags = api.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    return access


def _granularity(cuda: CudaContext, properties: Any) -> int:
    """The granularity. Raises UserError where the GPU has no virtual memory management."""
    supported = cuda.api.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
    if not cuda("cuDeviceGetAttribute", supported, cuda.device):
        raise UserError("device=cuda: this GPU, or the way it is shared, has no virtual memory management (cuMemMap)")
    smallest = cuda.api.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
    return int(cuda("cuMemGetAllocationGranularity", properties, smallest))


def _too_small(page_group_bytes: int, granularity: int) -> str:
    return (
        f"page_group={format_bytes(page_group_bytes)}: CUDA maps multiples of {format_bytes(granularity)}. "
        f"allocator.page_group={format_bytes(granularity)} is allowed here. Smaller ones need the patched driver of "
        "vAttention's authors: device=cpu has them for real, clock=modelled with its latencies. "
        "allocator.tensor_slicing=true makes large ones hold fewer tokens"
    )


def _give_back(
    cuda: CudaContext, ranges: dict[int, AddressRange], handles: dict[int, Any], page_group_bytes: int
) -> list[CudaError]:
    """Wait, unmap, free, release, let go of the context. Returns what failed; the rest is given back all the same."""
    calls: list[tuple[Any, ...]] = [("cuCtxSynchronize",)]  # kernels may still be reading
    for addresses in ranges.values():
        for slot, count in _runs(addresses.handles):
            calls.append(("cuMemUnmap", addresses.base + slot * page_group_bytes, count * page_group_bytes))
        calls.append(("cuMemAddressFree", addresses.base, addresses.num_slots * page_group_bytes))
    calls += [("cuMemRelease", handle) for handle in handles.values()]
    handles.clear()
    return [*cuda.give_back(calls), *cuda.give_back([("cuDevicePrimaryCtxRelease", cuda.device)])]


def _runs(slots: Iterable[int]) -> Iterator[tuple[int, int]]:
    """(first slot, count) of every run of neighbours."""
    for _, run in groupby(enumerate(sorted(slots)), key=lambda pair: pair[1] - pair[0]):
        neighbours = [slot for _, slot in run]
        yield neighbours[0], len(neighbours)
