"""The system calls of the host driver. Each raises OSError with its errno, and lets go of the interpreter's lock."""

import ctypes
import mmap
import os
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MAP_POPULATE = 0x8000
_KEEP_SIZE_PUNCH_HOLE = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
_FAILED = ctypes.c_void_p(-1).value  # MAP_FAILED
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_OVER_RESERVED = mmap.MAP_SHARED | _MAP_FIXED | _MAP_POPULATE

NO_FILE = -1  # anonymous memory in place of a file
FileRun = tuple[int, int, int]  # address, bytes, offset in the file

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def reserve_addresses(num_bytes: int, address: int | None = None) -> int:
    """Reserve addresses that fault when touched; at `address`, in place of whatever is mapped there."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | (_MAP_FIXED if address is not None else 0)
    return _mmap(address, num_bytes, 0, flags, -1, 0)


def map_file(address: int, num_bytes: int, fd: int, offset: int) -> None:
    """Map a run of a file over reserved addresses, its page tables filled in: no fault is left for the first touch.

    NO_FILE: pages that are zero, and of the same kind as a memfd's.
    """
    anonymous = mmap.MAP_ANONYMOUS if fd == NO_FILE else 0
    _mmap(address, num_bytes, _READ_WRITE, _OVER_RESERVED | anonymous, fd, 0 if anonymous else offset)


def map_files(fd: int, runs: Sequence[FileRun]) -> None:
    """Map runs of a file in order, as one call without the interpreter's lock; those before one that fails stay."""
    if len(runs) == 1:  # gains nothing from a loop, and need not wait for numba to load
        [(address, num_bytes, offset)] = runs
        map_file(address, num_bytes, fd, offset)
    elif number := load_loop()(np.array(runs, dtype=np.int64).reshape(-1, 3), _READ_WRITE, _OVER_RESERVED, fd):
        raise _error("mmap", number)


@cache
def load_loop() -> Callable[[npt.NDArray[np.int64], int, int, int], int]:
    """The loop of `map_files`, from now on loaded."""
    from kvarena.allocators.vmm.mmap_loop import mmap_loop  # numba takes seconds to import

    return mmap_loop()


def unmap_addresses(address: int, num_bytes: int) -> None:
    """Give addresses back, with whatever is mapped there."""
    if _libc.munmap(address, num_bytes):
        raise _error("munmap")


def allocate_file(fd: int, offset: int, num_bytes: int) -> None:
    """Make a run of a file resident and zero it.

    fallocate takes the pages, or says that there are none left; but it leaves zeroing to the first fault, which would
    make the first map of a page three times as dear as the next. So fault them in here, once.
    """
    os.posix_fallocate(fd, offset, num_bytes)
    flags = mmap.MAP_SHARED | _MAP_POPULATE
    unmap_addresses(_mmap(None, num_bytes, _READ_WRITE, flags, fd, offset), num_bytes)


def resident_bytes(address: int, num_bytes: int) -> int:
    """Bytes of mapped memory that are in physical pages, as the kernel has it."""
    page = mmap.PAGESIZE
    pages = np.zeros(-(-num_bytes // page), dtype=np.uint8)
    if _libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), ctypes.c_void_p(pages.ctypes.data)):
        raise _error("mincore")
    return int((pages & 1).sum()) * page


def punch_file(fd: int, offset: int, num_bytes: int) -> None:
    """Give the memory behind a run of a file back."""
    off_t = ctypes.c_long
    if _libc.fallocate(fd, _KEEP_SIZE_PUNCH_HOLE, off_t(offset), off_t(num_bytes)):
        raise _error("fallocate(PUNCH_HOLE)")


def _mmap(address: int | None, num_bytes: int, protection: int, flags: int, fd: int, offset: int) -> int:
    result = _libc.mmap(address, num_bytes, protection, flags, fd, offset)
    if result is None or result == _FAILED:
        raise _error("mmap")
    return int(result)


def _error(call: str, number: int | None = None) -> OSError:
    number = ctypes.get_errno() if number is None else number
    return OSError(number, f"{call}: {os.strerror(number)}")
