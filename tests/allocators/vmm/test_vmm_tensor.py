"""Tensors over addresses; the host's memory stands for a GPU's."""

import gc
import os
import subprocess
import sys
import weakref

import pytest
import torch

from kvarena.allocators.sizes import GB, KB
from kvarena.allocators.vmm.cuda import CudaDriver
from kvarena.allocators.vmm.host import HostDriver
from kvarena.allocators.vmm.tensor import bytes_at, strided_tensor

SIZE = 64 * KB
CPU = torch.device("cpu")


@pytest.fixture
def driver():
    with_memory = HostDriver(SIZE)
    yield with_memory
    with_memory.close()


def test_a_tensor_shares_the_memory(driver):
    base = driver.reserve(2 * SIZE)
    driver.map(base, 0, driver.create(2))
    memory = bytes_at(base, 2 * SIZE, CPU, driver)
    assert (memory.dtype, memory.shape, memory.device.type) == (torch.uint8, (2 * SIZE,), "cpu")
    memory[SIZE:] = 7
    other = strided_tensor(driver, base, torch.uint8, (2, SIZE), (SIZE, 1))
    assert other.data_ptr() == memory.data_ptr() == base
    assert other[:, 5].tolist() == [0, 7]


def test_a_tensor_spans_terabytes_that_nobody_has_mapped(driver):
    base = driver.reserve(2000 * GB)
    driver.map(base, 1999 * GB, driver.create(1))
    memory = bytes_at(base, 2000 * GB, CPU, driver).view(torch.bfloat16).as_strided((2000, 16), (GB // 2, 1))
    memory[1999] = 1.5
    assert memory[1999].sum() == 24


class Owner:
    pass


def owned(block: bytearray) -> tuple[torch.Tensor, weakref.ref]:
    owner = Owner()
    address = torch.frombuffer(block, dtype=torch.uint8).data_ptr()
    return bytes_at(address, len(block), CPU, owner), weakref.ref(owner)


def test_a_tensor_keeps_the_owner_alive_as_long_as_any_view():
    block = bytearray(64)
    memory, owner = owned(block)
    row = memory[3:9].view(torch.uint8)
    del memory
    gc.collect()
    assert owner() is not None
    row[0] = 5
    assert block[3] == 5
    del row
    assert owner() is None


def test_a_tensor_that_dies_of_an_exception_leaves_it_as_it_is():
    """The list that holds it goes while the exception is under way, and so its owner's end runs."""
    block, ended = bytearray(64), []

    def made(number: int) -> torch.Tensor:
        memory, owner = owned(block)
        weakref.finalize(owner(), ended.append, number)
        if number == 2:
            raise ValueError("the last of them fails")
        return memory

    with pytest.raises(ValueError, match="the last of them fails"):
        [made(number) for number in range(3)]
    assert {0, 1} <= set(ended)


def test_a_tensor_that_lives_to_the_end_of_the_process():
    code = (
        "import torch\n"
        "from kvarena.allocators.vmm.tensor import bytes_at\n"
        "block = bytearray(64)\n"
        "address = torch.frombuffer(block, dtype=torch.uint8).data_ptr()\n"
        "torch.kept = bytes_at(address, 64, torch.device('cpu'), block)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ}, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_tensor_is_strided(driver):
    base = driver.reserve(4 * SIZE)
    driver.map(base, 0, driver.create(4))
    memory = strided_tensor(driver, base, torch.float32, (4, 2, 3), (SIZE, 64, 4))
    memory[:] = 1
    memory[2, 1, 2] = 5
    assert memory.stride() == (SIZE // 4, 16, 1)
    flat = bytes_at(base, 4 * SIZE, CPU, driver).view(torch.float32)
    assert flat[2 * SIZE // 4 + 16 + 2] == 5
    assert flat.sum() == 4 * 2 * 3 + 4


@pytest.mark.gpu
def test_a_tensor_over_memory_of_a_gpu():
    driver = CudaDriver(2 << 20)
    base = driver.reserve(8 << 20)
    memory = strided_tensor(driver, base, torch.uint8, (4, 2 << 20), (2 << 20, 1))  # nothing is mapped yet
    driver.map(base, 0, driver.create(4))
    memory[:] = 3
    assert (memory.data_ptr(), memory.device) == (base, torch.device("cuda", 0))
    assert int(memory.sum(dtype=torch.int64)) == 3 * (8 << 20)
    driver.close()
