"""The host driver: a memfd is physical memory, mmap maps it.

    reserve   mmap(PROT_NONE)            an unmapped page-group faults: SIGSEGV
    create    fallocate                  the pages are resident, and zero
    map       mmap(MAP_FIXED)            with MAP_POPULATE: a first touch would cost 10 us per 4 KB page instead;
                                         many are one call of a compiled loop (`mmap_loop.py`)
    unmap     mmap(PROT_NONE) again      before any release: a hole punched under a mapping silently reads as zeros
    release   fallocate(PUNCH_HOLE)

A handle is the index of a page-group in the memfd, so that a run of ascending handles is one call and one mapping.
"""

import ctypes
import errno
import os
import resource
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter_ns

from kvarena.allocators.sizes import format_bytes
from kvarena.allocators.vmm import libc
from kvarena.allocators.vmm.available import available_bytes
from kvarena.allocators.vmm.driver import AddressRange, Driver, DriverError, MapRun, OutOfPhysicalMemory
from kvarena.allocators.vmm.mappings import PROCESS_MAPPINGS, MappingBudget, count_boundaries
from kvarena.errors import UserError

_NO_MEMORY = (errno.ENOMEM, errno.ENOSPC)
_Run = tuple[AddressRange, int, Sequence[int]]  # addresses, first slot, handles


class HostDriver(Driver):
    """Page-groups of host memory. Needs Linux; says so elsewhere (UserError)."""

    granularity = os.sysconf("SC_PAGE_SIZE")
    device = "cpu"
    new_memory_is_zero = True  # the system's promise

    def __init__(self, page_group_bytes: int, mappings: MappingBudget = PROCESS_MAPPINGS) -> None:
        super().__init__(page_group_bytes)
        self._mappings = mappings
        self._next_handle = 0
        self._fd = self._open()
        # Runs at close(), or when the last tensor over our addresses is gone; at exit the system does it.
        self._give_back = weakref.finalize(self, _give_back, self._fd, self._ranges, page_group_bytes, mappings)
        self._give_back.atexit = False

    def _open(self) -> int:
        if why := no_memfd():
            raise UserError(
                f"page-groups are mapped from a memfd, and {why}. Systems whose pool is resident from the start, as of "
                "static and paged, do without one on Linux; clock=modelled runs anywhere"
            )
        return os.memfd_create("kvarena")

    def counted_bytes(self) -> int:
        """Blocks of the memfd, not the process's resident size: that counts an alias twice."""
        return 0 if self.closed else os.fstat(self._fd).st_blocks * 512

    def idle(self) -> None:
        """Ask for the parent's number."""
        with self._call("idle"):
            os.getppid()

    def _reserve(self, num_bytes: int) -> int:
        self._mappings.take(1)
        with self._call("reserve"):
            try:
                return libc.reserve_addresses(num_bytes)
            except OSError:
                self._mappings.take(-1)
                raise

    def _create(self, count: int) -> list[int]:
        first, num_bytes = self._next_handle, count * self.page_group_bytes
        offset = first * self.page_group_bytes
        _check_room(num_bytes)
        with self._call("create"):
            os.ftruncate(self._fd, offset + num_bytes)
            try:
                libc.allocate_file(self._fd, offset, num_bytes)
            except OSError:
                os.ftruncate(self._fd, offset)  # drops what had become resident
                raise
        self._next_handle += count
        return list(range(first, first + count))

    def _zero(self, address: int, num_bytes: int) -> None:
        ctypes.memset(address, 0, num_bytes)

    def prepare(self) -> None:
        """Load the compiled loop."""
        libc.load_loop()

    def map_runs(self, runs: Sequence[MapRun]) -> None:
        """Map several runs, in order: all of them, or none. One call, without the interpreter's lock."""
        entered: list[_Run] = []
        change = 0
        try:
            for run in runs:
                addresses, slot = self._mappable(*run)
                change += self._boundary_change(addresses, slot, run.handles)
                self._enter(addresses, slot, run.handles)  # a later run may be its neighbour
                entered.append((addresses, slot, run.handles))
            self._map_at_once(entered, change)
        except BaseException:
            for addresses, slot, handles in entered:
                self._strike(addresses, slot, len(handles))
            raise

    def _map(self, addresses: AddressRange, slot: int, handles: Sequence[int]) -> None:
        self._map_at_once([(addresses, slot, handles)], self._boundary_change(addresses, slot, handles))

    def _map_at_once(self, runs: Sequence[_Run], change: int) -> None:
        """Map runs, which change the number of mappings so much."""
        files = [file for run in runs for file in self._files(*run)]
        self._mappings.take(change)
        try:
            with self._call("map", len(files)):
                libc.map_files(self._fd, files)
        except BaseException:
            for addresses, slot, handles in runs:  # a failed mmap(MAP_FIXED) may have dropped the reservation under it
                libc.reserve_addresses(len(handles) * self.page_group_bytes, self._address(addresses, slot))
            self._mappings.take(-change)
            raise

    def _files(self, addresses: AddressRange, slot: int, handles: Sequence[int]) -> Iterator[libc.FileRun]:
        """The parts of a run that are one mapping each: ascending page-groups lie in the memfd as in memory."""
        address, size = self._address(addresses, slot), self.page_group_bytes
        for handle, count in _ascending_runs(handles):
            yield address, count * size, handle * size
            address += count * size

    def _unmap(self, addresses: AddressRange, slot: int, count: int) -> None:
        change = self._boundary_change(addresses, slot, [None] * count)
        self._mappings.take(change)
        with self._call("unmap"):
            try:
                libc.reserve_addresses(count * self.page_group_bytes, self._address(addresses, slot))
            except OSError:
                self._mappings.take(-change)
                raise

    def _release(self, handles: Sequence[int]) -> None:
        for handle, count in _ascending_runs(handles):
            with self._call("release"):
                libc.punch_file(self._fd, handle * self.page_group_bytes, count * self.page_group_bytes)

    def _free(self, addresses: AddressRange) -> None:
        with self._call("free"):
            libc.unmap_addresses(addresses.base, addresses.num_slots * self.page_group_bytes)
        self._mappings.take(-1)

    def _close(self) -> None:
        self._give_back()

    def _address(self, addresses: AddressRange, slot: int) -> int:
        return addresses.base + slot * self.page_group_bytes

    def _boundary_change(self, addresses: AddressRange, slot: int, handles: Sequence[int | None]) -> int:
        """Mappings that the kernel gains when slots take these handles; its neighbours may merge with them."""
        end = slot + len(handles)
        left = [addresses.handles.get(slot - 1)] if slot else []
        right = [addresses.handles.get(end)] if end < addresses.num_slots else []
        before = [addresses.handles.get(i) for i in range(slot, end)]
        return count_boundaries([*left, *handles, *right]) - count_boundaries([*left, *before, *right])

    @contextmanager
    def _call(self, kind: str, calls: int = 1) -> Iterator[None]:
        """Count and time system calls, all of them where one fails, and say in our words why it failed."""
        started_ns = perf_counter_ns()
        try:
            yield
        except OSError as error:
            if error.errno in _NO_MEMORY:
                raise OutOfPhysicalMemory(
                    f"{kind}: the system is out of memory or space ({error.strerror}){_of_addresses()}"
                ) from error
            if error.errno == errno.EFBIG:
                raise UserError(f"{kind}: page-groups lie in a memfd, and {_too_large()}") from error
            raise DriverError(f"{kind} failed: {error}") from error
        finally:
            self._count(kind, started_ns, calls)


class AnonymousDriver(HostDriver):
    """One page-group at one place, of memory without a file: it begins with its mapping, and ends with it.

    For a pool that is mapped whole and once, where there is no memfd.
    """

    def _open(self) -> int:
        return libc.NO_FILE

    def counted_bytes(self) -> int:
        """Pages that are there, of those mapped."""
        mapped = [self._address(each, slot) for each in self._ranges.values() for slot in each.handles]
        return sum(libc.resident_bytes(address, self.page_group_bytes) for address in mapped)

    def _create(self, count: int) -> list[int]:
        if count > 1 or self._num_maps:
            raise ValueError("memory without a file is one page-group")
        _check_room(self.page_group_bytes)
        return [0]

    def _release(self, handles: Sequence[int]) -> None:
        """Nothing is left."""


def no_memfd(num_bytes: int = 0) -> str | None:
    """Why there can be no memfd of this size; None where there can."""
    if 0 <= resource.getrlimit(resource.RLIMIT_FSIZE)[0] < num_bytes:
        return _too_large()
    try:
        fd = os.memfd_create("kvarena")
        try:
            os.posix_fallocate(fd, 0, HostDriver.granularity)
        finally:
            os.close(fd)
    except AttributeError:
        return "this platform has no memfd (os.memfd_create), which came with Linux"
    except OSError as error:  # not known to the kernel, refused by a container, no descriptor left
        return f"the system refuses memfd_create, or fallocate in it: {error.strerror}"
    return None


def _too_large() -> str:
    return f"a file may have {format_bytes(resource.getrlimit(resource.RLIMIT_FSIZE)[0])} at most here (ulimit -f)"


def _of_addresses() -> str:
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    return "" if most == resource.RLIM_INFINITY else f"; addresses are limited to {format_bytes(most)} (ulimit -v)"


def _check_room(num_bytes: int) -> None:
    """Raises OutOfPhysicalMemory for more than the machine has left: the kernel would not refuse, but kill."""
    if num_bytes > (available := available_bytes()):
        raise OutOfPhysicalMemory(
            f"cannot create {format_bytes(num_bytes)} of page-groups: {format_bytes(available)} of memory are free"
        )


def _ascending_runs(handles: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first handle, count) of every run of consecutive ascending handles."""
    first = 0
    for i in range(1, len(handles) + 1):
        if i == len(handles) or handles[i] != handles[i - 1] + 1:
            yield handles[first], i - first
            first = i


def _give_back(fd: int, ranges: dict[int, AddressRange], page_group_bytes: int, mappings: MappingBudget) -> None:
    for addresses in ranges.values():
        libc.unmap_addresses(addresses.base, addresses.num_slots * page_group_bytes)
        slots = [addresses.handles.get(slot) for slot in range(addresses.num_slots)]
        mappings.take(-1 - count_boundaries(slots))
    if fd != libc.NO_FILE:
        os.close(fd)
