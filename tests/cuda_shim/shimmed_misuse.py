"""The shim is as strict as the driver's documentation: what it forbids is refused, and changes nothing.

Run by `test_cuda_shim.py`, through the bindings alone.
"""

import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from cuda.bindings import driver as cuda
from torch_on_shim import CONTEXT, POINTER, SHIM

from kvarena.allocators.sizes import MB
from kvarena.allocators.vmm.cuda import _pinned_memory_of, _read_and_write

pytestmark = pytest.mark.gpu  # chosen with the others

SIZE = 2 * MB
OK, REFUSED = cuda.CUresult.CUDA_SUCCESS, cuda.CUresult.CUDA_ERROR_INVALID_VALUE
MEMORY, ACCESS = _pinned_memory_of(cuda, 0), _read_and_write(cuda, 0)


class Scene(NamedTuple):
    """Eight page-groups of addresses: 0 and 1 are mapped and accessible, 3 is mapped only."""

    base: int
    handles: list[object]  # of them the fourth is mapped nowhere, and the fifth was released


@pytest.fixture
def scene() -> Iterator[Scene]:
    base = int(CONTEXT("cuMemAddressReserve", 8 * SIZE, SIZE, 0, 0))
    handles = [CONTEXT("cuMemCreate", SIZE, MEMORY, 0) for _ in range(5)]
    for slot, handle in zip((0, 1, 3), handles, strict=False):
        CONTEXT("cuMemMap", base + slot * SIZE, SIZE, 0, handle, 0)
    CONTEXT("cuMemSetAccess", base, 2 * SIZE, [ACCESS], 1)
    CONTEXT("cuMemRelease", handles[4])
    yield Scene(base, handles)
    CONTEXT("cuMemUnmap", base, 2 * SIZE)
    CONTEXT("cuMemUnmap", base + 3 * SIZE, SIZE)
    for handle in handles[:4]:
        CONTEXT("cuMemRelease", handle)
    CONTEXT("cuMemAddressFree", base, 8 * SIZE)


def map_at(scene: Scene, address: int, size: int = SIZE, offset: int = 0, handle: int = 3, flags: int = 0) -> tuple:
    return cuda.cuMemMap(scene.base + address, size, offset, scene.handles[handle], flags)


def access(base: int, size: int, change: Callable[[object], None] = lambda described: None) -> tuple:
    described = _read_and_write(cuda, 0)
    change(described)
    return cuda.cuMemSetAccess(base, size, [described], 1)


def only_reading(described: object) -> None:
    described.flags = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READ


MISUSES = {
    "a reservation of no page-groups": lambda s: cuda.cuMemAddressReserve(0, SIZE, 0, 0),
    "of a part of one": lambda s: cuda.cuMemAddressReserve(SIZE + 4096, SIZE, 0, 0),
    "aligned to no power of two": lambda s: cuda.cuMemAddressReserve(SIZE, 3 * SIZE, 0, 0),
    "a free of a part": lambda s: cuda.cuMemAddressFree(s.base, 4 * SIZE),
    "a free of what holds mappings": lambda s: cuda.cuMemAddressFree(s.base, 8 * SIZE),
    "memory of a part of a page-group": lambda s: cuda.cuMemCreate(4096, MEMORY, 0),
    "a second release": lambda s: cuda.cuMemRelease(s.handles[4]),
    "a map that is misaligned": lambda s: map_at(s, 4 * SIZE + 4096),
    "a map over a mapping": lambda s: map_at(s, SIZE),
    "a map past the reservation": lambda s: map_at(s, 8 * SIZE),
    "a map of a part": lambda s: map_at(s, 4 * SIZE, size=4096),
    "a map of more than there is": lambda s: map_at(s, 4 * SIZE, size=2 * SIZE),
    "a map with an offset": lambda s: map_at(s, 4 * SIZE, offset=SIZE),
    "a map with flags": lambda s: map_at(s, 4 * SIZE, flags=1),
    "a map of what was released": lambda s: map_at(s, 4 * SIZE, handle=4),
    "access to what is not mapped": lambda s: access(s.base + 4 * SIZE, SIZE),
    "access over a hole": lambda s: access(s.base, 4 * SIZE),
    "access to a part": lambda s: access(s.base + 4096, SIZE),
    "access for reading alone": lambda s: access(s.base, SIZE, only_reading),
    "an unmap of what is not mapped": lambda s: cuda.cuMemUnmap(s.base + 5 * SIZE, SIZE),
    "an unmap over a hole": lambda s: cuda.cuMemUnmap(s.base, 4 * SIZE),
    "an unmap of a part": lambda s: cuda.cuMemUnmap(s.base, 4096),
    "a pointer to what is not mapped": lambda s: cuda.cuPointerGetAttribute(POINTER, s.base + 2 * SIZE),
    "a pointer past the reservation": lambda s: cuda.cuPointerGetAttribute(POINTER, s.base + 8 * SIZE),
    "zeros without access": lambda s: cuda.cuMemsetD8(s.base + 3 * SIZE, 0, SIZE),
    "a copy without access": lambda s: cuda.cuMemcpyAsync(s.base, s.base + 3 * SIZE, SIZE, 0),
    "a copy over a hole": lambda s: cuda.cuMemcpyAsync(s.base + SIZE, s.base, 2 * SIZE, 0),
    "a second free of pinned memory": lambda s: cuda.cuMemFreeHost(s.base),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_what_is_forbidden_is_refused_and_changes_nothing(scene, misuse):
    before = SHIM.live()
    assert MISUSES[misuse](scene)[0] == REFUSED
    assert SHIM.live() == before


def test_what_is_allowed_is_done(scene):
    assert map_at(scene, 4 * SIZE)[0] == OK
    assert access(scene.base + 3 * SIZE, 2 * SIZE)[0] == OK
    assert cuda.cuMemsetD8(scene.base + 3 * SIZE, 7, 2 * SIZE)[0] == OK
    assert int(CONTEXT("cuPointerGetAttribute", POINTER, scene.base + 4 * SIZE + 5)) == scene.base + 4 * SIZE + 5
    assert cuda.cuMemUnmap(scene.base + 4 * SIZE, SIZE)[0] == OK


def test_a_thread_without_a_context_is_refused(scene):
    results = []
    thread = threading.Thread(target=lambda: results.append(cuda.cuMemUnmap(scene.base, SIZE)[0]))
    thread.start()
    thread.join()
    assert results == [cuda.CUresult.CUDA_ERROR_INVALID_CONTEXT]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Python 3.12, of forking
@pytest.mark.parametrize(("slot", "ends"), [(0, 0), (2, signal.SIGSEGV), (3, signal.SIGSEGV)])
def test_what_is_not_accessible_faults(scene, slot, ends):
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        ctypes.memset(scene.base + slot * SIZE, 1, 1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -ends


def test_memory_lives_as_long_as_a_mapping_of_it(scene):
    handle = CONTEXT("cuMemCreate", SIZE, MEMORY, 0)
    before = SHIM.live()
    CONTEXT("cuMemMap", scene.base + 6 * SIZE, SIZE, 0, handle, 0)
    CONTEXT("cuMemRelease", handle)
    assert SHIM.live().taken == before.taken
    CONTEXT("cuMemUnmap", scene.base + 6 * SIZE, SIZE)
    assert SHIM.live().taken == before.taken - SIZE
