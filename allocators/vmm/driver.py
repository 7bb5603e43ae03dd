"""The contract of a virtual-memory driver: addresses and physical memory apart, joined page-group by page-group.

    reserve        addresses, with nothing behind them                    cuMemAddressReserve
    create         page-groups of physical memory, ahead of their use     cuMemCreate
    clear          fill them with zeros                                   cuMemsetD8, at addresses of its own
    map            page-groups to addresses, ready to be read and written cuMemMap, then one cuMemSetAccess for all
    unmap          the addresses stay reserved, the page-groups created   cuMemUnmap
    release, free  undo create and reserve                                cuMemRelease, cuMemAddressFree

`Driver` keeps the books and checks every argument; a driver adds seven primitives. One page-group may be mapped at
several addresses (an alias); it is counted once. A driver serves one thread at a time.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import NamedTuple

from kvarena.allocators.sizes import round_up
from kvarena.errors import UserError


class OutOfPhysicalMemory(UserError):
    """The machine has not the memory asked for. Nothing was created."""


class DriverError(RuntimeError):
    """A driver call failed for a reason that is not the user's to mend; what had been done was undone."""


@dataclass(slots=True, eq=False)
class AddressRange:
    """A reservation, seen as slots of one page-group each."""

    base: int
    num_slots: int
    handles: dict[int, int] = field(default_factory=dict)  # slot -> the page-group mapped there


class MapRun(NamedTuple):
    """Page-groups to map, or that are mapped, side by side."""

    base: int  # of the reservation
    offset: int  # bytes
    handles: Sequence[int]


class CallTotals(NamedTuple):
    """Calls of one kind, or of all."""

    calls: int = 0
    ns: int = 0


class Driver(ABC):
    """Maps page-groups of one size.

    Arguments that break the contract (an offset out of range, a slot mapped twice, a page-group released while
    mapped) are bugs of the caller: ValueError, and nothing changes. When a call fails half-way, what it had done is
    undone before OutOfPhysicalMemory, UserError (a limit of the system) or DriverError is raised.
    """

    granularity: int  # bytes; a page-group is a multiple of it
    device: str  # of tensors over the addresses: "cpu" or "cuda"
    ordinal: int = 0  # which GPU
    new_memory_is_zero: bool  # else it may hold anything, a NaN too: whoever lets kernels read it must clear it first

    def __init__(self, page_group_bytes: int) -> None:
        """Raises UserError for a size that this driver does not map."""
        if page_group_bytes <= 0 or page_group_bytes % self.granularity:
            raise UserError(
                f"page_group={page_group_bytes} bytes: this driver maps multiples of {self.granularity} bytes"
            )
        self.page_group_bytes = page_group_bytes
        self.calls: dict[str, CallTotals] = {}  # by kind
        self.closed = False
        self._ranges: dict[int, AddressRange] = {}  # by base
        self._num_maps: dict[int, int] = {}  # handle -> addresses where it is mapped
        self._num_mapped = 0  # distinct handles mapped somewhere

    # ---- the contract ------------------------------------------------------------------------------------------

    def reserve(self, num_bytes: int) -> int:
        """Reserve addresses for `num_bytes`, rounded up to whole page-groups; returns the base address."""
        num_slots = round_up(num_bytes, self.page_group_bytes) // self.page_group_bytes
        if num_slots < 1:
            raise ValueError(f"cannot reserve {num_bytes} bytes")
        addresses = AddressRange(self._reserve(num_slots * self.page_group_bytes), num_slots)
        self._ranges[addresses.base] = addresses
        return addresses.base

    def create(self, count: int) -> list[int]:
        """Create `count` page-groups, resident from now on; returns their handles, ascending."""
        if count < 1:
            raise ValueError(f"cannot create {count} page-groups")
        handles = self._create(count)
        self._num_maps.update(dict.fromkeys(handles, 0))
        return handles

    def clear(self, handles: Sequence[int]) -> None:
        """Fill page-groups with zeros, mapped or not: through addresses that are taken for the purpose."""
        base = self.reserve(len(handles) * self.page_group_bytes)
        try:
            self.map(base, 0, handles)
            try:
                self._zero(base, len(handles) * self.page_group_bytes)
            finally:
                self.unmap(base, 0, len(handles))
        finally:
            if not self._ranges[base].handles:  # else unmapping failed, and `close` has to
                self.free(base)

    def map(self, base: int, offset: int, handles: Sequence[int]) -> None:
        """Map page-groups side by side from `base + offset` (bytes) on: all of them, or none."""
        addresses, slot = self._mappable(base, offset, handles)
        self._map(addresses, slot, handles)
        self._enter(addresses, slot, handles)

    def map_runs(self, runs: Sequence[MapRun]) -> None:
        """Map several runs, in order: all of them, or none."""
        for done, run in enumerate(runs):
            try:
                self.map(*run)
            except BaseException:
                for base, offset, handles in runs[:done]:
                    self.unmap(base, offset, len(handles))
                raise

    def unmap_runs(self, runs: Sequence[MapRun]) -> None:
        """Unmap several runs, in order: all of them, or none."""
        for done, (base, offset, handles) in enumerate(runs):
            try:
                self.unmap(base, offset, len(handles))
            except BaseException:
                self.map_runs(runs[:done])
                raise

    def unmap(self, base: int, offset: int, count: int) -> None:
        """Unmap `count` page-groups that lie side by side from `base + offset` (bytes) on."""
        addresses, slot = self._locate(base, offset, count)
        for i in range(slot, slot + count):
            if i not in addresses.handles:
                raise ValueError(f"slot {i} of range {base:#x} is not mapped")
        self._unmap(addresses, slot, count)
        self._strike(addresses, slot, count)

    def release(self, handles: Sequence[int]) -> None:
        """Give page-groups back to the system. They must be mapped nowhere."""
        if len(set(handles)) != len(handles):
            raise ValueError("a page-group cannot be released twice")
        for handle in handles:
            if self._num_maps.get(handle) != 0:
                state = "is still mapped" if handle in self._num_maps else "does not exist"
                raise ValueError(f"page-group {handle} {state}")
        self._release(handles)
        for handle in handles:
            del self._num_maps[handle]

    def free(self, base: int) -> None:
        """Give the addresses of a reservation back. Nothing may be mapped there."""
        addresses, _ = self._locate(base, 0, 0)
        if addresses.handles:
            raise ValueError(f"{len(addresses.handles)} page-groups are still mapped in range {base:#x}")
        self._free(addresses)
        del self._ranges[base]

    @property
    def mapped_bytes(self) -> int:
        """Bytes of distinct page-groups that are mapped; an alias counts once."""
        return self._num_mapped * self.page_group_bytes

    @property
    def pooled_bytes(self) -> int:
        """Bytes of page-groups created, but mapped nowhere."""
        return (len(self._num_maps) - self._num_mapped) * self.page_group_bytes

    @abstractmethod
    def counted_bytes(self) -> int:
        """Physical bytes of this driver as the operating system or the device's driver counts them."""

    @abstractmethod
    def idle(self) -> None:
        """Call the system for nothing, counted as `idle`: what making and counting any call takes by itself."""

    def totals(self) -> CallTotals:
        """Calls of all kinds so far."""
        return CallTotals(sum(c.calls for c in self.calls.values()), sum(c.ns for c in self.calls.values()))

    def close(self) -> None:
        """Unmap, free and release everything. Closing twice is allowed."""
        if self.closed:
            return
        self.closed = True
        self._close()
        self._ranges.clear()
        self._num_maps.clear()
        self._num_mapped = 0

    def prepare(self) -> None:  # noqa: B027  # most drivers have nothing to load
        """Load what `map_runs` needs, which would else be part of its first call."""

    # ---- the primitives: arguments are checked, the books not yet changed --------------------------------------

    @abstractmethod
    def _reserve(self, num_bytes: int) -> int: ...

    @abstractmethod
    def _create(self, count: int) -> list[int]: ...

    @abstractmethod
    def _zero(self, address: int, num_bytes: int) -> None:
        """Write zeros to mapped memory; they are there when it returns."""

    @abstractmethod
    def _map(self, addresses: AddressRange, slot: int, handles: Sequence[int]) -> None: ...

    @abstractmethod
    def _unmap(self, addresses: AddressRange, slot: int, count: int) -> None: ...

    @abstractmethod
    def _release(self, handles: Sequence[int]) -> None: ...

    @abstractmethod
    def _free(self, addresses: AddressRange) -> None: ...

    @abstractmethod
    def _close(self) -> None:
        """Unmap, free and release everything at once."""

    # ---- helpers -----------------------------------------------------------------------------------------------

    def _mappable(self, base: int, offset: int, handles: Sequence[int]) -> tuple[AddressRange, int]:
        """The reservation and the first slot of a run, checking that it may be mapped."""
        addresses, slot = self._locate(base, offset, len(handles))
        for i, handle in enumerate(handles, slot):
            if i in addresses.handles:
                raise ValueError(f"slot {i} of range {base:#x} is mapped already")
            if handle not in self._num_maps:
                raise ValueError(f"page-group {handle} does not exist")
        return addresses, slot

    def _enter(self, addresses: AddressRange, slot: int, handles: Sequence[int]) -> None:
        """Enter a run into the books."""
        for i, handle in enumerate(handles, slot):
            addresses.handles[i] = handle
            self._num_mapped += self._num_maps[handle] == 0
            self._num_maps[handle] += 1

    def _strike(self, addresses: AddressRange, slot: int, count: int) -> None:
        """Strike a run out of the books."""
        for i in range(slot, slot + count):
            handle = addresses.handles.pop(i)
            self._num_maps[handle] -= 1
            self._num_mapped -= self._num_maps[handle] == 0

    def _locate(self, base: int, offset: int, count: int) -> tuple[AddressRange, int]:
        """Find the reservation, and the slot at `offset`, checking that `count` slots fit."""
        if base not in self._ranges:
            raise ValueError(f"no range is reserved at {base:#x}")
        slot, misaligned = divmod(offset, self.page_group_bytes)
        addresses = self._ranges[base]
        if misaligned or slot < 0 or slot + count > addresses.num_slots:
            raise ValueError(f"{count} page-groups at offset {offset} of range {base:#x}: outside it, or misaligned")
        return addresses, slot

    def _count(self, kind: str, started_ns: int, made: int = 1) -> None:
        """Count so many calls to the system, the first of them begun at `started_ns`."""
        calls, ns = self.calls.get(kind, (0, 0))
        self.calls[kind] = CallTotals(calls + made, ns + perf_counter_ns() - started_ns)
