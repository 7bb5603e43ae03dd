"""Helpers of these tests that are no tests: `two_clocks`, `by_hand` and `newcomers` are imported by their names."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))


@pytest.fixture
def one_thread():
    """Small products on a busy machine wait for each other's threads: 12 times slower with two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
