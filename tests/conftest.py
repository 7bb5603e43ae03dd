"""What every test shares: few threads, and GPU tests skipped in one place."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported

import pytest
import torch

from kvarena.kernels.threads import set_compute_threads

set_compute_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu`, with a reason, where torch sees no CUDA GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU; torch sees none here"))
