"""A stand-in for `cuda.bindings.driver`: address space, page-groups and mappings, backed by real host memory.

It is as strict as the driver's documentation, records every call, and fails where it is told to. What is mapped and
accessible can be read and written by the process, so that everything above the driver runs through it for real; what
is not, faults.
"""

import ctypes
import os
import threading
from collections import Counter
from dataclasses import dataclass, field

from cuda.bindings import driver as bindings

from kvarena.allocators.sizes import GB, MB, round_up
from kvarena.allocators.vmm import libc
from kvarena.allocators.vmm.cuda import CudaDriver

RESULT = bindings.CUresult
CONTEXT = "the primary context"


class Refused(Exception):
    """The driver returns this result."""


@dataclass(eq=False)
class Memory:
    """What cuMemCreate made. It lives as long as a handle or a mapping refers to it."""

    offset: int  # in the memfd
    size: int
    released: bool = False
    mappings: int = 0


@dataclass
class Mapping:
    memory: Memory
    size: int
    accessible: bool = False


@dataclass
class FakeCuda:
    """One GPU."""

    granularity: int = 2 * MB
    total_bytes: int = GB
    calls: list[tuple] = field(default_factory=list)  # (function, *arguments), those that failed included
    reserved: dict[int, int] = field(default_factory=dict)  # base -> bytes
    memories: list[Memory] = field(default_factory=list)  # alive
    mapped: dict[int, Mapping] = field(default_factory=dict)  # by address
    retained: int = 0  # references to the primary context
    supports_vmm: bool = True

    def __post_init__(self) -> None:
        self._fd = os.memfd_create("fake-gpu")
        self._threads = threading.local()
        self._failures: dict[str, tuple[int, object]] = {}  # function or "" for any -> calls that pass before, result

    def __del__(self) -> None:
        os.close(self._fd)

    def __getattr__(self, name: str) -> object:
        """A function of ours, recorded and checked; types and enumerations are the bindings' own."""
        if not name.startswith("cu"):
            return getattr(bindings, name)
        function = object.__getattribute__(self, f"_{name}")

        def call(*arguments: object) -> tuple:
            self.calls.append((name, *arguments))
            try:
                self._fail_if_told(name)
                values = function(*arguments)
            except Refused as refusal:
                return (refusal.args[0], *[None] * (name in ("cuMemCreate", "cuMemAddressReserve")))
            return (RESULT.CUDA_SUCCESS, *([] if values is None else values))

        return call

    # ---- what tests ask and tell -------------------------------------------------------------------------------

    def fail(self, function: str = "", after: int = 0, result: object = RESULT.CUDA_ERROR_UNKNOWN) -> None:
        """The next call of `function` (any, if empty) after `after` of them fails, once, and does nothing."""
        self._failures[function] = (after, result)

    @property
    def armed(self) -> bool:
        return bool(self._failures)

    @property
    def names(self) -> list[str]:
        return [call[0] for call in self.calls]

    def count(self) -> Counter:
        return Counter(self.names)

    @property
    def created_bytes(self) -> int:
        return sum(memory.size for memory in self.memories)

    @property
    def mapped_bytes(self) -> int:
        """Of memories mapped somewhere, aliases once."""
        return sum(memory.size for memory in self.memories if memory.mappings)

    @property
    def state(self) -> tuple:
        """All that can leak."""
        mapped = {address: (m.memory.offset, m.size, m.accessible) for address, m in self.mapped.items()}
        return dict(self.reserved), [m.offset for m in self.memories], mapped, self.retained

    @property
    def nothing_left(self) -> bool:
        return self.state == ({}, [], {}, 0)

    # ---- the driver --------------------------------------------------------------------------------------------

    def _cuInit(self, flags):
        require(flags == 0)

    def _cuDeviceGet(self, ordinal):
        require(ordinal == 0, RESULT.CUDA_ERROR_INVALID_DEVICE)
        return (0,)

    def _cuDevicePrimaryCtxRetain(self, device):
        self.retained += 1
        return (CONTEXT,)

    def _cuDevicePrimaryCtxRelease(self, device):
        require(self.retained > 0, RESULT.CUDA_ERROR_INVALID_CONTEXT)
        self.retained -= 1

    def _cuCtxSetCurrent(self, context):
        require(context == CONTEXT and self.retained > 0, RESULT.CUDA_ERROR_INVALID_CONTEXT)
        self._threads.current = context

    def _cuCtxSynchronize(self):
        self._in_context()

    def _cuDeviceGetAttribute(self, attribute, device):
        return (int(self.supports_vmm),)

    def _cuMemGetAllocationGranularity(self, properties, option):
        require(properties.type == bindings.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED)
        return (self.granularity,)

    def _cuDriverGetVersion(self):
        return (13000,)

    def _cuMemGetInfo(self):
        self._in_context()
        return self.total_bytes - self.created_bytes, self.total_bytes

    def _cuMemAddressReserve(self, size, alignment, hint, flags):
        self._in_context()
        require(size > 0 and size % self.granularity == 0 and alignment.bit_count() == 1 and hint == flags == 0)
        start = libc.reserve_addresses(size + alignment)
        base = round_up(start, alignment)
        libc.unmap_addresses(base + size, start + alignment - base)
        if base > start:
            libc.unmap_addresses(start, base - start)
        self.reserved[base] = size
        return (bindings.CUdeviceptr(base),)

    def _cuMemAddressFree(self, base, size):
        self._in_context()
        require(self.reserved.get(base) == size)
        require(not any(base <= address < base + size for address in self.mapped))
        libc.unmap_addresses(base, size)
        del self.reserved[base]

    def _cuMemCreate(self, size, properties, flags):
        self._in_context()
        require(size > 0 and size % self.granularity == 0 and flags == 0)
        require(properties.location.type == bindings.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE)
        require(size <= self.total_bytes - self.created_bytes, RESULT.CUDA_ERROR_OUT_OF_MEMORY)
        memory = Memory(os.fstat(self._fd).st_size, size)
        os.pwrite(self._fd, b"\xff" * size, memory.offset)  # CUDA does not promise zeros: NaNs, for all we know
        self.memories.append(memory)
        return (memory,)

    def _cuMemRelease(self, memory):
        self._in_context()
        require(not memory.released)
        memory.released = True
        self._forget(memory)

    def _cuMemMap(self, address, size, offset, memory, flags):
        self._in_context()
        require(size > 0 and address % self.granularity == size % self.granularity == offset == flags == 0)
        require(memory in self.memories and not memory.released and size <= memory.size)
        require(self._within_a_reservation(address, size))
        require(not any(a < address + size and address < a + m.size for a, m in self.mapped.items()))
        self.mapped[address] = Mapping(memory, size)
        memory.mappings += 1

    def _cuMemSetAccess(self, address, size, descriptors, count):
        self._in_context()
        require(len(descriptors) == count == 1)
        require(descriptors[0].flags == bindings.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE)
        for start, mapping in self._whole_mappings(address, size):
            libc.map_file(start, mapping.size, self._fd, mapping.memory.offset)
            mapping.accessible = True

    def _cuMemsetD8(self, address, value, size):
        self._in_context()
        require(all(mapping.accessible for _, mapping in self._whole_mappings(address, size)))
        ctypes.memset(address, value, size)

    def _cuMemUnmap(self, address, size):
        self._in_context()
        for start, mapping in self._whole_mappings(address, size):
            libc.reserve_addresses(mapping.size, start)
            del self.mapped[start]
            mapping.memory.mappings -= 1
            self._forget(mapping.memory)

    # ---- helpers -----------------------------------------------------------------------------------------------

    def _fail_if_told(self, name: str) -> None:
        for function in ("", name):
            if function in self._failures:
                after, result = self._failures[function]
                if after == 0:
                    del self._failures[function]
                    raise Refused(result)
                self._failures[function] = (after - 1, result)

    def _in_context(self) -> None:
        require(getattr(self._threads, "current", None) == CONTEXT, RESULT.CUDA_ERROR_INVALID_CONTEXT)

    def _within_a_reservation(self, address: int, size: int) -> bool:
        return any(base <= address and address + size <= base + length for base, length in self.reserved.items())

    def _whole_mappings(self, address: int, size: int) -> list[tuple[int, Mapping]]:
        """The mappings that tile the range; a hole, or a part of a mapping, is refused."""
        found, at = [], address
        while at < address + size:
            require(at in self.mapped)
            found.append((at, self.mapped[at]))
            at += self.mapped[at].size
        require(size > 0 and at == address + size)
        return found

    def _forget(self, memory: Memory) -> None:
        if memory.released and memory.mappings == 0:
            libc.punch_file(self._fd, memory.offset, memory.size)
            self.memories.remove(memory)


def require(condition: bool, result: object = RESULT.CUDA_ERROR_INVALID_VALUE) -> None:
    if not condition:
        raise Refused(result)


class FakedCudaDriver(CudaDriver):
    """The CUDA driver over a fake GPU, whose memory is the host's."""

    device = "cpu"

    def __init__(self, page_group_bytes: int, fake: FakeCuda | None = None) -> None:
        self.fake = fake or FakeCuda()
        super().__init__(page_group_bytes, api=self.fake)
