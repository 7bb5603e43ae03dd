"""What only the host driver does: system calls, faults, the limit on mappings."""

import errno
import gc
import os
import resource
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from kvarena.allocators.sizes import GB, KB, MB
from kvarena.allocators.vmm import host, libc
from kvarena.allocators.vmm.driver import DriverError, MapRun, OutOfPhysicalMemory
from kvarena.allocators.vmm.host import HostDriver
from kvarena.allocators.vmm.mappings import MappingBudget, count_boundaries, count_mappings
from kvarena.allocators.vmm.tensor import strided_tensor
from kvarena.errors import UserError

SIZE = 64 * KB


@pytest.fixture
def driver():
    with_memory = HostDriver(SIZE)
    yield with_memory
    with_memory.close()


@pytest.mark.parametrize("size", [64 * KB, 128 * KB, 256 * KB, 2 * MB])
def test_every_page_group_of_the_paper(size):
    driver = HostDriver(size)
    base, handles = driver.reserve(3 * size), driver.create(2)
    driver.map(base, size, handles)
    memory = strided_tensor(driver, base, torch.uint8, (3, size), (size, 1))
    memory[1:] = 9
    assert (driver.mapped_bytes, driver.counted_bytes()) == (2 * size, 2 * size)
    driver.close()


def status_of(code: str) -> int:
    """Exit status of a child that runs `code`, with a driver whose slot 0 of 2 is mapped."""
    set_up = f"""
        import ctypes
        from kvarena.allocators.vmm.host import HostDriver
        size = {SIZE}
        driver = HostDriver(size)
        base, [handle] = driver.reserve(2 * size), driver.create(1)
        driver.map(base, 0, [handle])
        ctypes.memset(base, 1, size)
    """
    program = textwrap.dedent(set_up) + code
    return subprocess.run([sys.executable, "-c", program], stderr=subprocess.DEVNULL, check=False).returncode


@pytest.mark.parametrize(
    ("touch", "status"),
    [
        ("ctypes.string_at(base, size)", 0),
        ("ctypes.string_at(base, size + 1)", -signal.SIGSEGV),
        ("ctypes.memset(base + 2 * size - 1, 1, 1)", -signal.SIGSEGV),
        ("driver.unmap(base, 0, 1); ctypes.string_at(base, 1)", -signal.SIGSEGV),
        ("driver.close(); ctypes.string_at(base, 1)", -signal.SIGSEGV),
    ],
)
def test_touching_what_is_not_mapped_is_a_segmentation_fault(touch, status):
    assert status_of(touch) == status


def test_a_mapped_page_group_takes_no_page_faults(driver):
    """Pages are resident when created and in the page tables when mapped: else every 4 KB would fault once."""
    num_groups = 16
    base, handles = driver.reserve(num_groups * SIZE), driver.create(num_groups)
    driver.map(base, 0, handles)
    memory = strided_tensor(driver, base, torch.uint8, (num_groups * SIZE,), (1,))
    memory[:64].fill_(1)  # whatever torch loads on its first fill
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    memory.fill_(2)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < num_groups * SIZE // driver.granularity // 4


def test_what_is_created_is_zeroed_at_once(driver):
    """fallocate alone would leave that to the first map. Pages still to be zeroed are holes to SEEK_HOLE."""
    driver.create(4)
    assert os.lseek(driver._fd, 0, os.SEEK_HOLE) == 4 * SIZE


def test_a_run_of_ascending_page_groups_is_one_call(driver):
    base, h = driver.reserve(8 * SIZE), driver.create(8)
    driver.map(base, 0, [h[0], h[1], h[2], h[5], h[6], h[4]])
    assert driver.calls["map"].calls == 3


def test_released_memory_is_gone_from_the_memfd_and_comes_back_as_zeros(driver):
    base, handles = driver.reserve(2 * SIZE), driver.create(2)
    driver.map(base, 0, handles)
    memory = strided_tensor(driver, base, torch.uint8, (2, SIZE), (SIZE, 1))
    memory[:] = 3
    driver.unmap(base, 0, 2)
    driver.release(handles[:1])
    assert driver.counted_bytes() == driver.pooled_bytes == SIZE
    driver.map(base, 0, driver.create(1))
    assert not memory[0].any()


# ---- failures --------------------------------------------------------------------------------------------------


def failing(number: int, after: int, call):
    """`call`, which fails with errno `number` from the call after the first `after` on."""
    calls = []

    def wrapper(*args):
        calls.append(args)
        if len(calls) > after:
            raise OSError(number, os.strerror(number))
        return call(*args)

    return wrapper


def half_mapped(fd: int, runs: list) -> None:
    """`map_files`, of which the last mmap fails; that one has dropped the reservation."""
    for address, num_bytes, offset in runs[:-1]:
        libc.map_file(address, num_bytes, fd, offset)
    address, num_bytes, _ = runs[-1]
    libc.unmap_addresses(address, num_bytes)
    raise OSError(errno.EACCES, os.strerror(errno.EACCES))


def test_a_map_that_fails_half_way_is_rolled_back(monkeypatch):
    budget = MappingBudget()
    driver = HostDriver(SIZE, budget)
    base, h = driver.reserve(6 * SIZE), driver.create(6)
    driver.map(base, 0, h[:1])
    lines, counted = count_mappings(), budget.total
    with monkeypatch.context() as patch:
        patch.setattr(libc, "map_files", half_mapped)
        with pytest.raises(DriverError, match=r"map failed.*Permission denied"):
            driver.map(base, SIZE, [h[5], h[3], h[1]])
    assert (driver.mapped_bytes, driver.pooled_bytes) == (SIZE, 5 * SIZE)
    assert (count_mappings(), budget.total) == (lines, counted)
    driver.map(base, SIZE, [h[5], h[3], h[1]])
    assert driver.mapped_bytes == 4 * SIZE
    driver.close()


def test_a_batch_that_fails_half_way_is_rolled_back(monkeypatch):
    """Runs that are neighbours in memory and in the memfd: the kernel merges them, and must count as before."""
    budget = MappingBudget()
    driver = HostDriver(SIZE, budget)
    base, h = driver.reserve(6 * SIZE), driver.create(6)
    driver.map(base, 0, h[:1])
    batch = [MapRun(base, SIZE, h[1:3]), MapRun(base, 4 * SIZE, [h[5]]), MapRun(base, 3 * SIZE, [h[3]])]
    lines, counted = count_mappings(), budget.total
    with monkeypatch.context() as patch:
        patch.setattr(libc, "map_files", half_mapped)
        with pytest.raises(DriverError, match=r"map failed.*Permission denied"):
            driver.map_runs(batch)
    assert (driver.mapped_bytes, driver.pooled_bytes) == (SIZE, 5 * SIZE)
    assert (count_mappings(), budget.total) == (lines, counted)
    driver.map_runs(batch)
    assert driver.mapped_bytes == 5 * SIZE
    assert count_mappings() - lines == budget.total - counted == 1  # h[0:4] are one mapping now, h[5] another
    driver.close()


def test_the_loop_stops_at_the_first_mmap_that_fails_and_says_why():
    fd = os.memfd_create("pages")
    os.truncate(fd, 3 * SIZE)
    base = libc.reserve_addresses(3 * SIZE)
    lines = count_mappings()
    with pytest.raises(OSError, match="mmap") as failure:
        libc.map_files(fd, [(base, SIZE, 0), (base + SIZE, SIZE, 1), (base + 2 * SIZE, SIZE, SIZE)])
    assert failure.value.errno == errno.EINVAL  # an offset within a page
    assert count_mappings() - lines == 1
    libc.unmap_addresses(base, 3 * SIZE)
    os.close(fd)


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.ENOSPC])
def test_creating_more_than_there_is_gives_back_what_was_had(driver, monkeypatch, number):
    def half(fd: int, offset: int, num_bytes: int) -> None:
        os.posix_fallocate(fd, offset, num_bytes // 2)
        raise OSError(number, os.strerror(number))

    driver.create(1)
    with monkeypatch.context() as patch:
        patch.setattr(libc, "allocate_file", half)
        with pytest.raises(OutOfPhysicalMemory, match="out of memory or space"):
            driver.create(8)
    assert driver.counted_bytes() == driver.pooled_bytes == SIZE
    assert len(driver.create(8)) == 8
    assert driver.counted_bytes() == driver.pooled_bytes == 9 * SIZE


def test_a_pool_larger_than_the_machine_is_refused_before_the_kernel_kills_us(driver, monkeypatch):
    monkeypatch.setattr(host, "available_bytes", lambda: MB)
    with pytest.raises(OutOfPhysicalMemory, match=r"cannot create 4MB.*1MB of memory are free"):
        driver.create(4 * MB // SIZE)
    assert driver.counted_bytes() == 0


def test_addresses_that_cannot_be_reserved(driver):
    with pytest.raises(OutOfPhysicalMemory, match="reserve"):
        driver.reserve(1 << 60)


@pytest.mark.parametrize(
    ("call", "step"),
    [
        ("reserve_addresses", lambda driver, base, handles: driver.unmap(base, 0, 1)),
        ("punch_file", lambda driver, base, handles: driver.release(handles[1:])),
        ("unmap_addresses", lambda driver, base, handles: driver.free(driver.reserve(SIZE))),
    ],
)
def test_when_giving_back_fails_nothing_has_changed(driver, monkeypatch, call, step):
    base, handles = driver.reserve(2 * SIZE), driver.create(2)
    driver.map(base, 0, handles[:1])
    working = getattr(libc, call)
    with monkeypatch.context() as patch:
        patch.setattr(libc, call, failing(errno.EPERM, 0, working))
        with pytest.raises(DriverError, match="Operation not permitted"):
            step(driver, base, handles)
    assert (driver.mapped_bytes, driver.pooled_bytes, driver.counted_bytes()) == (SIZE, SIZE, 2 * SIZE)


def test_a_platform_without_memfd(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(UserError, match="no memfd"):
        HostDriver(SIZE)


# ---- mappings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("handles", "boundaries"),
    [
        ([], 0),
        ([None], 0),
        ([None, None], 0),
        ([4, 5, 6], 0),
        ([6, 5, 4], 2),
        ([4, 4], 1),
        ([None, 1, 2, None, None, 3], 3),
    ],
)
def test_boundaries(handles, boundaries):
    assert count_boundaries(handles) == boundaries


def test_our_count_of_mappings_is_the_kernels():
    budget = MappingBudget()
    driver = HostDriver(SIZE, budget)
    start, kernel = budget.total, count_mappings()

    def assert_counts_agree() -> None:
        assert budget.total - start == count_mappings() - kernel

    # A reservation may merge with a neighbour of the same kind, so the first page-group is mapped at both ends.
    base, h = driver.reserve(32 * SIZE), driver.create(32)
    driver.map(base, 0, [h[20]])
    driver.map(base, 31 * SIZE, [h[19]])
    assert_counts_agree()
    for offset, handles in ((4, h[4:8]), (8, h[8:10]), (3, h[3:4]), (12, h[1::-1]), (20, [h[2], h[16], h[17]])):
        driver.map(base, offset * SIZE, handles)
        assert_counts_agree()
    for offset, count in ((5, 1), (3, 2), (12, 2), (0, 1), (20, 3), (6, 4), (31, 1)):
        driver.unmap(base, offset * SIZE, count)
    driver.map(base, 0, [h[20]])
    driver.map(base, 31 * SIZE, [h[19]])
    assert_counts_agree()
    before = budget.total
    driver.free(driver.reserve(SIZE))
    assert budget.total == before
    driver.close()
    assert budget.total == start


def test_the_limit_on_mappings_is_an_error_that_says_what_to_change():
    used = count_mappings()
    driver = HostDriver(SIZE, MappingBudget(limit=used + 24, headroom=8))
    base, h = driver.reserve(64 * SIZE), driver.create(40)
    slots = iter(range(0, 40, 2))  # a hole after each: two mappings more
    with pytest.raises(UserError) as refusal:
        [driver.map(base, slot * SIZE, [h[slot]]) for slot in slots]
    mapped = next(slots) // 2 - 1
    assert 4 <= mapped <= 8
    message = str(refusal.value)
    assert f"vm.max_map_count={used + 24}" in message
    assert "needs 2 more" in message
    for change in ("page_group", "tensor_slicing", "sysctl -w vm.max_map_count="):
        assert change in message
    assert driver.mapped_bytes == mapped * SIZE
    driver.unmap(base, 0, 1)  # giving back makes room again
    driver.map(base, 0, [h[0]])
    driver.close()


def test_other_mappings_of_the_process_are_recounted_near_the_limit(monkeypatch):
    counted = [100]
    monkeypatch.setattr("kvarena.allocators.vmm.mappings.count_mappings", lambda: counted[0])
    budget = MappingBudget(limit=1000, headroom=100)
    budget.take(300)
    budget.take(100)  # 500 in all, as far as the budget knows
    counted[0] = 900  # but others have made 400 more, and the rest is headroom
    with pytest.raises(UserError, match="the process has 900 and needs 1 more"):
        budget.take(1)


# ---- tensors ---------------------------------------------------------------------------------------------------


def test_tensors_keep_the_memory_of_a_forgotten_driver(driver):
    gc.collect()  # what other tests left behind
    fd_count = len(os.listdir("/proc/self/fd"))
    forgotten = HostDriver(SIZE)
    base = forgotten.reserve(SIZE)
    forgotten.map(base, 0, forgotten.create(1))
    memory = strided_tensor(forgotten, base, torch.bfloat16, (SIZE // 2,), (2,))
    row = memory[5:10]
    del forgotten, memory
    gc.collect()
    row.fill_(1.5)
    assert row.sum() == 7.5
    assert len(os.listdir("/proc/self/fd")) == fd_count + 1
    del row
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == fd_count


def test_a_tensor_may_span_terabytes_of_addresses(driver):
    base = driver.reserve(100 * GB)
    driver.map(base, 99 * GB, driver.create(1))
    memory = strided_tensor(driver, base, torch.float32, (100, 16), (GB, 4))
    memory[99] = 1
    assert memory[99].sum() == 16


def test_strides_that_split_an_element_are_refused(driver):
    with pytest.raises(ValueError, match="no tensor"):
        strided_tensor(driver, driver.reserve(SIZE), torch.float32, (2, 2), (6, 4))
