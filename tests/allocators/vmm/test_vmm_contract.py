"""What every virtual-memory driver must do. A driver joins by a line in DRIVERS."""

import pytest
import torch
from fake_cuda import FakedCudaDriver

from kvarena.allocators.sizes import KB, MB
from kvarena.allocators.vmm.cuda import CudaDriver
from kvarena.allocators.vmm.driver import Driver, MapRun
from kvarena.allocators.vmm.host import HostDriver
from kvarena.allocators.vmm.tensor import strided_tensor
from kvarena.errors import UserError

DRIVERS = {
    "host": lambda: HostDriver(64 * KB),
    "cuda, faked": lambda: FakedCudaDriver(2 * MB),
    "cuda": lambda: CudaDriver(2 * MB),
}


@pytest.fixture(params=["host", "cuda, faked", pytest.param("cuda", marks=pytest.mark.gpu)])
def driver(request):
    with_memory = DRIVERS[request.param]()
    yield with_memory
    with_memory.close()


def tensor_over(driver: Driver, base: int, slots: int) -> torch.Tensor:
    """[slots, ints of a page-group] over a reservation."""
    size = driver.page_group_bytes
    return strided_tensor(driver, base, torch.int32, (slots, size // 4), (size, 4))


def assert_books_are_the_systems(driver: Driver, mapped: int, pooled: int) -> None:
    """Counts are in page-groups; what the system counts is their sum, byte for byte."""
    size = driver.page_group_bytes
    assert (driver.mapped_bytes, driver.pooled_bytes) == (mapped * size, pooled * size)
    assert driver.counted_bytes() == (mapped + pooled) * size


def test_a_life(driver):
    size = driver.page_group_bytes
    base = driver.reserve(7 * size + 1)  # rounded up: 8
    assert_books_are_the_systems(driver, 0, 0)
    handles = driver.create(4)
    assert handles == sorted(set(handles))
    assert_books_are_the_systems(driver, 0, 4)
    driver.map(base, 5 * size, handles[:3])
    assert_books_are_the_systems(driver, 3, 1)
    memory = tensor_over(driver, base, 8)
    if driver.new_memory_is_zero:
        assert not memory[5:8].any()
    memory[5:8] = torch.arange(3, dtype=torch.int32)[:, None]
    driver.unmap(base, 5 * size, 3)
    driver.map(base, 0, handles[:3])
    assert [int(memory[i].unique()) for i in range(3)] == [0, 1, 2]  # the memory moved, not the bytes
    driver.unmap(base, 0, 3)
    driver.release(handles)
    assert_books_are_the_systems(driver, 0, 0)
    driver.free(base)


def test_cleared_page_groups_are_zero_wherever_they_are_mapped(driver):
    size = driver.page_group_bytes
    base, handles = driver.reserve(3 * size), driver.create(3)
    driver.map(base, 0, handles)
    memory = tensor_over(driver, base, 3)
    memory[:] = -1
    driver.unmap(base, 0, 2)
    driver.clear([handles[2], handles[0]])  # one of them is mapped elsewhere meanwhile
    assert_books_are_the_systems(driver, 1, 2)
    driver.map(base, 0, handles[:2])
    assert [bool((memory[i] == value).all()) for i, value in enumerate((0, -1, 0))] == [True] * 3


def test_new_memory_is_zero_where_the_driver_says_so(driver):
    base, handles = driver.reserve(2 * driver.page_group_bytes), driver.create(2)
    if not driver.new_memory_is_zero:
        driver.clear(handles)
    driver.map(base, 0, handles)
    assert not tensor_over(driver, base, 2).any()


def test_scattered_page_groups_lie_side_by_side(driver):
    size = driver.page_group_bytes
    base, handles = driver.reserve(4 * size), driver.create(4)
    memory = tensor_over(driver, base, 4)
    driver.map(base, 0, handles)
    memory[:] = torch.arange(4, dtype=torch.int32)[:, None]
    driver.unmap(base, 0, 4)
    order = [2, 3, 1, 0]
    driver.map(base, 0, [handles[i] for i in order])
    assert memory[:, 0].tolist() == memory[:, -1].tolist() == order


def test_several_runs_are_mapped_together(driver):
    """Neighbours, scattered page-groups, an alias, two reservations."""
    size = driver.page_group_bytes
    first, second = driver.reserve(6 * size), driver.reserve(2 * size)
    h = driver.create(5)
    driver.map(first, 0, h)
    tensor_over(driver, first, 5)[:] = torch.arange(5, dtype=torch.int32)[:, None]
    driver.unmap(first, 0, 5)
    before = driver.totals().calls
    runs = [(first, size, [h[1], h[0]]), (second, size, [h[4]]), (first, 3 * size, h[2:4]), (second, 0, [h[4]])]
    driver.map_runs([MapRun(*run) for run in runs])
    assert_books_are_the_systems(driver, 5, 0)
    assert tensor_over(driver, first, 5)[1:, -1].tolist() == [1, 0, 2, 3]
    assert tensor_over(driver, second, 2)[:, 0].tolist() == [4, 4]
    assert driver.totals().calls - before >= len(runs)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda base, size, h: (base, 2 * size, [h[2]]), "mapped already"),  # by an earlier run of the same batch
        (lambda base, size, h: (base, 4 * size, [h[2]]), "outside"),
        (lambda base, size, h: (base, 3 * size, [10**9]), "does not exist"),
    ],
)
def test_of_several_runs_all_are_mapped_or_none(driver, bad, message):
    size = driver.page_group_bytes
    base, h = driver.reserve(4 * size), driver.create(3)
    driver.map(base, 0, h[:1])
    with pytest.raises(ValueError, match=message):
        driver.map_runs([MapRun(base, size, h[1:]), MapRun(*bad(base, size, h))])
    assert_books_are_the_systems(driver, 1, 2)
    driver.map_runs([MapRun(base, size, h[1:])])
    driver.map_runs([])
    assert_books_are_the_systems(driver, 3, 0)


def test_an_alias_is_the_same_memory_and_counts_once(driver):
    size = driver.page_group_bytes
    first, second = driver.reserve(2 * size), driver.reserve(2 * size)
    handles = driver.create(2)
    driver.map(first, 0, handles)
    driver.map(second, size, handles[:1])
    assert_books_are_the_systems(driver, 2, 0)
    one, other = tensor_over(driver, first, 1)[0], tensor_over(driver, second, 2)[1]
    one[:] = 7
    assert other.unique().tolist() == [7]
    other[3] = 8
    assert one[3] == 8
    driver.unmap(first, 0, 1)
    assert_books_are_the_systems(driver, 2, 0)  # the other address still maps it
    assert other[3] == 8
    driver.unmap(second, size, 1)
    assert_books_are_the_systems(driver, 1, 1)


def test_unmapped_memory_is_still_there_and_can_be_mapped_elsewhere(driver):
    size = driver.page_group_bytes
    base, [handle] = driver.reserve(2 * size), driver.create(1)
    memory = tensor_over(driver, base, 2)
    driver.map(base, 0, [handle])
    memory[0] = 5
    driver.unmap(base, 0, 1)
    driver.map(base, size, [handle])
    assert memory[1].unique().tolist() == [5]


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda d, base, hs: d.map(base, 0, hs[:1]), "mapped already"),
        (lambda d, base, hs: d.map(base, d.page_group_bytes, [hs[2], 10**9]), "does not exist"),
        (lambda d, base, hs: d.map(base, 3 * d.page_group_bytes, hs[1:3]), "outside"),
        (lambda d, base, hs: d.map(base, -d.page_group_bytes, hs[1:2]), "outside"),
        (lambda d, base, hs: d.map(base, 1, hs[1:2]), "misaligned"),
        (lambda d, base, hs: d.map(base + 1, 0, hs[1:2]), "no range"),
        (lambda d, base, hs: d.unmap(base, 0, 2), "not mapped"),
        (lambda d, base, hs: d.unmap(base, 4 * d.page_group_bytes, 1), "outside"),
        (lambda d, base, hs: d.release(hs[:2]), "still mapped"),
        (lambda d, base, hs: d.release([hs[1], hs[1]]), "twice"),
        (lambda d, base, hs: d.release([10**9]), "does not exist"),
        (lambda d, base, hs: d.free(base), "still mapped"),
        (lambda d, base, hs: d.free(base + 1), "no range"),
        (lambda d, base, hs: d.reserve(0), "reserve"),
        (lambda d, base, hs: d.create(0), "create"),
    ],
)
def test_misuse_is_refused_and_changes_nothing(driver, misuse, message):
    size = driver.page_group_bytes
    base, handles = driver.reserve(4 * size), driver.create(3)
    driver.map(base, 0, handles[:1])
    with pytest.raises(ValueError, match=message):
        misuse(driver, base, handles)
    assert_books_are_the_systems(driver, 1, 2)
    driver.map(base, size, handles[1:])  # all still usable
    assert_books_are_the_systems(driver, 3, 0)


def test_calls_are_counted_by_kind(driver):
    size = driver.page_group_bytes
    base, handles = driver.reserve(4 * size), driver.create(4)
    before, kinds_before = driver.totals(), set(driver.calls)
    driver.map(base, 0, handles)
    driver.unmap(base, 0, 4)
    after = driver.totals()
    assert {"map", "unmap"} <= set(driver.calls) - kinds_before
    assert after.calls - before.calls == sum(driver.calls[kind].calls for kind in set(driver.calls) - kinds_before)
    assert after.ns > before.ns
    assert {"reserve", "create"} <= kinds_before


def test_closing_twice_and_with_everything_mapped(driver):
    base = driver.reserve(4 * driver.page_group_bytes)
    driver.map(base, 0, driver.create(4))
    driver.close()
    driver.close()
    assert_books_are_the_systems(driver, 0, 0)


def test_a_page_group_must_be_a_multiple_of_the_granularity(driver):
    with pytest.raises(UserError, match=f"multiples of {driver.granularity}"):
        type(driver)(driver.granularity + 1)
