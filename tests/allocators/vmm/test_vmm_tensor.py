"""Tensors over addresses, by each of the ways; the host's memory stands for a GPU's."""

import gc
import os
import subprocess
import sys
import weakref

import pytest
import torch

from kvarena.allocators.sizes import GB, KB
from kvarena.allocators.vmm import dlpack, tensor
from kvarena.allocators.vmm.cuda import CudaDriver
from kvarena.allocators.vmm.dlpack import bytes_at
from kvarena.allocators.vmm.host import HostDriver
from kvarena.allocators.vmm.tensor import strided_tensor

SIZE = 64 * KB
CPU = torch.device("cpu")


@pytest.fixture
def driver():
    with_memory = HostDriver(SIZE)
    yield with_memory
    with_memory.close()


def test_dlpack_shares_the_memory(driver):
    base = driver.reserve(2 * SIZE)
    driver.map(base, 0, driver.create(2))
    memory = bytes_at(base, 2 * SIZE, CPU, driver)
    assert (memory.dtype, memory.shape, memory.device.type) == (torch.uint8, (2 * SIZE,), "cpu")
    memory[SIZE:] = 7
    other = strided_tensor(driver, base, torch.uint8, (2, SIZE), (SIZE, 1))
    assert other.data_ptr() == memory.data_ptr() == base
    assert other[:, 5].tolist() == [0, 7]


def test_dlpack_spans_terabytes_that_nobody_has_mapped(driver):
    base = driver.reserve(2000 * GB)
    driver.map(base, 1999 * GB, driver.create(1))
    memory = bytes_at(base, 2000 * GB, CPU, driver).view(torch.bfloat16).as_strided((2000, 16), (GB // 2, 1))
    memory[1999] = 1.5
    assert memory[1999].sum() == 24


def test_dlpack_keeps_the_owner_alive_as_long_as_any_view():
    class Owner:
        pass

    owner, block = Owner(), bytearray(64)
    gone, before = weakref.ref(owner), len(dlpack._alive)
    address = torch.frombuffer(block, dtype=torch.uint8).data_ptr()
    row = bytes_at(address, 64, CPU, owner)[3:9].view(torch.uint8)
    del owner
    gc.collect()
    assert gone() is not None
    row[0] = 5
    assert block[3] == 5
    del row
    gc.collect()
    assert gone() is None
    assert len(dlpack._alive) == before


def test_a_tensor_that_lives_to_the_end_of_the_process():
    code = (
        "import torch\n"
        "from kvarena.allocators.vmm.dlpack import bytes_at\n"
        "block = bytearray(64)\n"
        "address = torch.frombuffer(block, dtype=torch.uint8).data_ptr()\n"
        "torch.kept = bytes_at(address, 64, torch.device('cpu'), block)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ}, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


class OnAGpu(HostDriver):
    """Says that its memory is a GPU's."""

    device = "cuda"


@pytest.fixture
def torch_with_a_gpu(monkeypatch):
    """What `strided_tensor` asks of torch; its tensors lie on the host."""
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(tensor, "bytes_at", lambda base, size, device, owner: bytes_at(base, size, CPU, owner))
    return monkeypatch


@pytest.mark.usefixtures("torch_with_a_gpu")
def test_a_gpus_tensor_is_strided_like_the_hosts():
    driver = OnAGpu(SIZE)
    base = driver.reserve(4 * SIZE)
    driver.map(base, 0, driver.create(4))
    memory = strided_tensor(driver, base, torch.float32, (4, 2, 3), (SIZE, 64, 4))
    memory[:] = 1
    memory[2, 1, 2] = 5
    assert memory.stride() == (SIZE // 4, 16, 1)
    flat = bytes_at(base, 4 * SIZE, CPU, driver).view(torch.float32)
    assert flat[2 * SIZE // 4 + 16 + 2] == 5
    assert flat.sum() == 4 * 2 * 3 + 4
    driver.close()


def test_where_dlpack_is_refused_the_array_interface_serves(torch_with_a_gpu):
    def refuse(*args):
        raise BufferError("no")

    def as_tensor(array, device):
        described = array.__cuda_array_interface__
        assert (str(device), described["typestr"], described["data"]) == ("cuda:0", "|u1", (base, False))
        return bytes_at(described["data"][0], described["shape"][0], CPU, array)

    driver = OnAGpu(SIZE)
    base = driver.reserve(SIZE)
    driver.map(base, 0, driver.create(1))
    torch_with_a_gpu.setattr(tensor, "bytes_at", refuse)
    torch_with_a_gpu.setattr(torch, "as_tensor", as_tensor)
    memory = strided_tensor(driver, base, torch.float32, (3,), (4,))
    memory[:] = 2
    assert memory.data_ptr() == base
    torch_with_a_gpu.setattr(torch, "as_tensor", lambda array, device: torch.zeros(SIZE, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="copies"):
        strided_tensor(driver, base, torch.float32, (3,), (4,))
    driver.close()


@pytest.mark.gpu
def test_both_ways_lead_to_the_same_memory_of_a_gpu():
    driver = CudaDriver(2 << 20)
    base = driver.reserve(8 << 20)
    device = torch.device("cuda", 0)
    packed = bytes_at(base, 8 << 20, device, driver)  # nothing is mapped yet
    driver.map(base, 0, driver.create(4))
    packed[:] = 3
    array = torch.as_tensor(tensor._CudaArray(driver, base, 8 << 20), device=device)
    assert packed.data_ptr() == array.data_ptr() == base
    assert int(array.sum(dtype=torch.int64)) == 3 * (8 << 20)
    driver.close()
