"""What only the CUDA driver does, on a recording fake: order of calls, threads, memory."""

import gc
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fake_cuda import RESULT, FakedCudaDriver

from kvarena.allocators.sizes import GB, KB, MB
from kvarena.allocators.vmm.cuda import CudaDriver
from kvarena.allocators.vmm.cuda_context import CudaContext, CudaError
from kvarena.allocators.vmm.tensor import strided_tensor
from kvarena.errors import UserError

SIZE = 2 * MB


# ---- order of calls --------------------------------------------------------------------------------------------


def test_every_call_of_a_life_in_order(fake):
    driver = FakedCudaDriver(SIZE, fake)
    base, handles = driver.reserve(3 * SIZE), driver.create(2)
    driver.map(base, SIZE, handles)
    driver.unmap(base, SIZE, 2)
    driver.release(handles)
    driver.free(base)
    driver.close()
    assert fake.names == [
        "cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain",
        "cuCtxSetCurrent", "cuDeviceGetAttribute", "cuMemGetAllocationGranularity", "cuMemGetInfo",
        "cuMemAddressReserve", "cuMemCreate", "cuMemCreate",
        "cuMemMap", "cuMemMap", "cuMemSetAccess",
        "cuMemUnmap", "cuMemRelease", "cuMemRelease", "cuMemAddressFree",
        "cuCtxSynchronize", "cuDevicePrimaryCtxRelease",
    ]  # fmt: skip
    assert fake.nothing_left


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2]])
def test_a_run_is_made_accessible_and_unmapped_in_one_call_each(driver, fake, order):
    base, handles = driver.reserve(8 * SIZE), driver.create(4)
    fake.calls.clear()
    driver.map(base, 2 * SIZE, [handles[i] for i in order])
    maps, access = fake.calls[:-1], fake.calls[-1]
    assert [call[:3] for call in maps] == [("cuMemMap", base + (2 + i) * SIZE, SIZE) for i in range(4)]
    assert access[:3] == ("cuMemSetAccess", base + 2 * SIZE, 4 * SIZE)
    fake.calls.clear()
    driver.unmap(base, 3 * SIZE, 2)
    assert fake.calls == [("cuMemUnmap", base + 3 * SIZE, 2 * SIZE)]
    assert {kind: driver.calls[kind].calls for kind in ("map", "set_access", "unmap")} == {
        "map": 4, "set_access": 1, "unmap": 1,
    }  # fmt: skip


def test_what_is_mapped_again_is_made_accessible_again(driver, fake):
    base, [handle] = driver.reserve(SIZE), driver.create(1)
    for _ in range(3):
        driver.map(base, 0, [handle])
        driver.unmap(base, 0, 1)
    assert fake.count()["cuMemSetAccess"] == fake.count()["cuMemMap"] == 3


def test_closing_unmaps_each_run_once_and_only_then_frees_and_releases(fake):
    driver = FakedCudaDriver(SIZE, fake)
    base, other, handles = driver.reserve(8 * SIZE), driver.reserve(2 * SIZE), driver.create(5)
    driver.map(base, 5 * SIZE, handles[3:])
    driver.map(base, 0, handles[:3])
    driver.unmap(base, SIZE, 1)
    driver.map(other, 0, handles[:1])  # an alias
    fake.calls.clear()
    driver.close()
    sizes = [(name, *arguments[1:]) for name, *arguments in fake.calls if name in ("cuMemUnmap", "cuMemAddressFree")]
    assert sizes == [
        ("cuMemUnmap", SIZE), ("cuMemUnmap", SIZE), ("cuMemUnmap", 2 * SIZE), ("cuMemAddressFree", 8 * SIZE),
        ("cuMemUnmap", SIZE), ("cuMemAddressFree", 2 * SIZE),
    ]  # fmt: skip
    assert fake.names[0] == "cuCtxSynchronize"  # no kernel may still be reading
    assert fake.names[-6:] == ["cuMemRelease"] * 5 + ["cuDevicePrimaryCtxRelease"]
    assert fake.nothing_left


def test_a_page_group_with_an_alias_outlives_its_first_mapping(driver, fake):
    base, [handle] = driver.reserve(2 * SIZE), driver.create(1)
    driver.map(base, 0, [handle])
    driver.map(base, SIZE, [handle])
    driver.unmap(base, 0, 1)
    with pytest.raises(ValueError, match="still mapped"):
        driver.release([handle])
    assert "cuMemRelease" not in fake.names
    assert (driver.mapped_bytes, driver.counted_bytes(), fake.created_bytes) == (SIZE, SIZE, SIZE)
    driver.unmap(base, SIZE, 1)
    driver.release([handle])
    assert fake.created_bytes == 0


def test_page_groups_may_be_multiples_of_the_granularity(fake):
    driver = FakedCudaDriver(8 * MB, fake)
    base, handles = driver.reserve(16 * MB), driver.create(2)
    driver.map(base, 0, handles)
    assert fake.mapped_bytes == driver.mapped_bytes == 16 * MB
    driver.close()
    assert fake.nothing_left


# ---- threads ---------------------------------------------------------------------------------------------------


def test_every_thread_works_in_the_primary_context_and_enters_it_once(driver, fake):
    base, handles = driver.reserve(4 * SIZE), driver.create(4)
    fake.calls.clear()
    with ThreadPoolExecutor(max_workers=1) as worker:
        for i, handle in enumerate(handles):
            worker.submit(driver.map, base, i * SIZE, [handle]).result()
    assert fake.count()["cuCtxSetCurrent"] == 1
    assert fake.mapped_bytes == 4 * SIZE
    driver.unmap(base, 0, 4)
    assert fake.count()["cuCtxSetCurrent"] == 1


# ---- making a driver -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"])
def test_without_a_gpu_it_is_the_users_mistake(fake, function):
    fake.fail(function, result=RESULT.CUDA_ERROR_NO_DEVICE)
    with pytest.raises(UserError, match=f"device=cuda.*{function} failed: CUDA_ERROR_NO_DEVICE"):
        FakedCudaDriver(SIZE, fake)
    assert fake.nothing_left


@pytest.mark.parametrize(
    "function", ["cuCtxSetCurrent", "cuDeviceGetAttribute", "cuMemGetAllocationGranularity", "cuMemGetInfo"]
)
def test_a_driver_that_cannot_be_made_lets_go_of_the_context(fake, function):
    fake.fail(function)
    with pytest.raises(CudaError, match=function):
        FakedCudaDriver(SIZE, fake)
    assert fake.nothing_left


def test_a_gpu_without_virtual_memory_management(fake):
    fake.supports_vmm = False
    with pytest.raises(UserError, match="no virtual memory management"):
        FakedCudaDriver(SIZE, fake)
    assert fake.nothing_left


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (64 * KB, r"page_group=64KB: CUDA maps multiples of 2MB\..*patched driver.*device=cpu.*tensor_slicing"),
        (3 * MB, f"page_group={3 * MB} bytes: this driver maps multiples of {2 * MB} bytes"),
    ],
)
def test_the_papers_small_page_groups_need_another_driver(fake, size, said):
    with pytest.raises(UserError, match=said):
        FakedCudaDriver(size, fake)
    assert fake.nothing_left


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_real_bindings_without_a_driver_are_the_users_mistake():
    with pytest.raises(UserError, match="device=cuda: no CUDA driver, or no GPU 0"):
        CudaDriver(SIZE)


def test_without_the_bindings_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(UserError, match="pip install"):
        CudaContext()


# ---- memory ----------------------------------------------------------------------------------------------------


def test_taken_bytes_is_what_the_gpu_says(driver, fake):
    driver.create(3)
    assert driver.taken_bytes() == driver.counted_bytes() == 3 * SIZE
    stranger = FakedCudaDriver(SIZE, fake)
    stranger.create(1)  # someone else's memory is not told apart
    assert (driver.taken_bytes(), driver.counted_bytes()) == (4 * SIZE, 3 * SIZE)
    stranger.close()


def test_tensors_keep_the_memory_of_a_forgotten_driver(fake):
    forgotten = FakedCudaDriver(SIZE, fake)
    base = forgotten.reserve(SIZE)
    forgotten.map(base, 0, forgotten.create(1))
    row = strided_tensor(forgotten, base, torch.bfloat16, (SIZE // 2,), (2,))[5:10]
    del forgotten
    gc.collect()
    row.fill_(1.5)
    assert row.sum() == 7.5
    assert not fake.nothing_left
    del row
    gc.collect()
    assert fake.nothing_left


@pytest.mark.gpu
def test_the_gpu_loses_what_the_handles_hold():
    driver = CudaDriver(SIZE)
    handles = driver.create(512)
    assert driver.counted_bytes() == GB
    assert abs(driver.taken_bytes() - GB) <= 64 * MB  # page tables; anyone else on this GPU
    driver.release(handles)
    assert abs(driver.taken_bytes()) <= 64 * MB
    driver.close()


@pytest.mark.gpu
def test_kernels_run_while_the_background_maps():
    """Work in flight on mapped page-groups is not disturbed by mapping its neighbours from another thread."""
    driver = CudaDriver(SIZE)
    base, handles = driver.reserve(64 * SIZE), driver.create(64)
    driver.map(base, 0, handles[:8])
    memory = strided_tensor(driver, base, torch.float32, (64, SIZE // 4), (SIZE, 4))
    memory[:8] = 1
    with ThreadPoolExecutor(max_workers=1) as worker:
        mapping = [worker.submit(driver.map, base, slot * SIZE, [handles[slot]]) for slot in range(8, 64)]
        sums = [memory[:8].sum() for _ in range(200)]
        [done.result() for done in mapping]
    memory[8:] = 2
    assert {float(s) for s in sums} == {8 * SIZE / 4}
    assert float(memory.sum()) == (8 + 2 * 56) * SIZE / 4
    torch.cuda.synchronize()
    driver.close()
