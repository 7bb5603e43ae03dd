"""Helpers of these tests that are no tests are imported by name: `fake_cuda`, `sharing_cases`, `vattention_by_hand`."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))


@pytest.fixture
def fake():
    """A GPU that records every call."""
    from fake_cuda import FakeCuda

    return FakeCuda()


@pytest.fixture
def driver(fake):
    """Our driver over it, with page-groups of 2 MB; at the end nothing is left on the GPU."""
    from fake_cuda import FakedCudaDriver

    with_memory = FakedCudaDriver(2 << 20, fake)
    fake.calls.clear()
    yield with_memory
    with_memory.close()
    assert fake.nothing_left
