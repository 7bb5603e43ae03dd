"""Runs of page-groups are mapped by one call of a compiled loop, which calls the shim's library itself.

Run by `test_cuda_shim.py`; what happens where a call of it fails is `shimmed_failures.py`'s.
"""

import pytest
import torch

from kvarena.allocators.vmm.cuda import CudaDriver
from kvarena.allocators.vmm.driver import MapRun
from kvarena.allocators.vmm.drivers import granularity_of, lasting_context
from kvarena.allocators.vmm.tensor import strided_tensor

pytestmark = pytest.mark.gpu  # chosen with the others


def test_runs_are_mapped_in_one_call_as_they_are_one_by_one(monkeypatch):
    with lasting_context("cuda"):
        size = granularity_of("cuda")
        driver = CudaDriver(size)
        driver.prepare()
        base, handles = driver.reserve(6 * size), driver.create(4)
        monkeypatch.setattr(driver, "map", None)  # nothing is mapped through the interpreter
        driver.map_runs([MapRun(base, 0, handles[:1]), MapRun(base, 3 * size, [handles[3], handles[0], handles[2]])])
        memory = strided_tensor(driver, base, torch.uint8, (6, size), (size, 1))
        for number, slot in enumerate((4, 3, 5)):
            memory[slot] = number
        assert memory[[0, 3, 4, 5], -1].tolist() == [0, 1, 0, 2]
        assert (driver.calls["map"].calls, driver.calls["set_access"].calls) == (4, 2)
        assert driver.mapped_bytes == 3 * size
        with pytest.raises(ValueError, match="mapped already"):
            driver.map_runs([MapRun(base, size, handles[1:2]), MapRun(base, size, handles[1:2])])
        assert driver.mapped_bytes == 3 * size
        driver.idle()
        del memory
        driver.close()
