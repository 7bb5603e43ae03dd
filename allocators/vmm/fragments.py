"""Keep a machine's scattered free pages out of the pools that are about to be created.

The kernel hands out its smallest free fragments first. Of pools created one after the other, the first is therefore
made of single pages from all over the memory and the last of long runs, and reading the first can take half as long
again (`benchmarks/memory_placement.py`): an order of creation, mistaken for a difference between allocators. While
the fragments are held by a throw-away memfd, pools are made of long runs, as on a GPU, whose memory is its own.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvarena.allocators.vmm.available import available_bytes
from kvarena.allocators.vmm.host import no_memfd

_BUDDYINFO = Path("/proc/buddyinfo")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_RUN_ORDER = 6  # free runs of 2^6 pages (256 KB) or more are long enough; 4 left a spread of 11 %, 8 gained nothing


@contextmanager
def scattered_pages_held(device: str = "cpu") -> Iterator[int]:
    """Hold the free memory that lies in short runs; yields how many bytes. To be used around the
    creation of everything that is to be compared; costs about a second per GB.

    Holds at most half of what is available, and nothing for pools of a GPU, or where the system does not tell, or does
    not let us.
    """
    scattered = min(scattered_bytes(), available_bytes() // 2) // _PAGE * _PAGE if device == "cpu" else 0
    fd = _held(scattered) if scattered else None
    try:
        yield 0 if fd is None else scattered
    finally:
        if fd is not None:
            os.close(fd)


def _held(num_bytes: int) -> int | None:
    """A memfd of so much memory; None where the system has none, or none so large."""
    if no_memfd(num_bytes):
        return None
    fd = os.memfd_create("kvarena-fragments")
    try:
        os.posix_fallocate(fd, 0, num_bytes)
    except OSError:
        os.close(fd)
        return None
    return fd


def scattered_bytes() -> int:
    """Free memory in short runs, as the kernel's lists of free blocks have it."""
    try:
        zones = _BUDDYINFO.read_text().splitlines()
    except OSError:
        return 0
    blocks = [[int(count) for count in zone.split()[4:]] for zone in zones]  # "Node 0, zone Normal" and counts by order
    return sum(count * _PAGE << order for zone in blocks for order, count in enumerate(zone[:_RUN_ORDER]))
