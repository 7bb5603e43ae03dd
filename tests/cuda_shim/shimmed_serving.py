"""A tiny model served end to end with device=cuda, over the shim and the interpreted kernels: static's tokens.

Run by `test_cuda_shim.py`. Policy, scheduler, executor, store, driver and kernels are those of a GPU's run; only torch
is told, by `torch_on_shim`, that the shim's memory is a GPU's.
"""

import pytest
import torch
from torch_on_shim import SHIM, launches

from kvarena.allocators.sizes import KB
from kvarena.experiments.command.compose import compose_run
from kvarena.experiments.gpu_validation.steps.served import Served, serve
from kvarena.harness.model.build import build_model
from kvarena.harness.run.run import Run

pytestmark = pytest.mark.gpu  # chosen with the others

SYSTEMS = {
    "cuda": "[static-triton,paged-triton,vattention/triton{page_group: 64KB, tensor_slicing: true}]",
    "cpu": "[static-numba]",
}


def tiny_run(device: str) -> Run[object]:
    """Four requests of some tokens each; 2 KB of K for each token, so that 32 tokens fill a page-group."""
    return compose_run(
        "experiment=memory_waste", "clock=measured", "arrival=all_at_once", f"device={device}",
        "model=tiny-llama", "model.dtype=float32", "model.num_heads=2", "model.num_kv_heads=1", "model.head_size=256",
        "trace=random", "trace.num_requests=4", "trace.range_ratio=0.8", "trace.prompt_tokens=20",
        "trace.output_tokens=5", "trace.max_tokens=64", f"systems={SYSTEMS[device]}",
    )  # fmt: skip


def served(device: str, memory: float, left_out: str = "") -> dict[str, Served]:
    """By allocator."""
    run = tiny_run(device)
    model = build_model(run.model, run.device.kind)
    systems = {system.allocator.name: system for system in run.systems if system.allocator.name != left_out}
    return {name: serve(run, system, model, memory) for name, system in systems.items()}


@pytest.fixture(autouse=True, scope="module")
def small_page_groups(unwatched):
    """Smaller than a GPU's, so that a tiny model's rows have several."""
    SHIM.sizes(granularity=64 * KB)
    yield
    SHIM.sizes()


@pytest.fixture(scope="module")
def expected() -> dict[int, list[int]]:
    """What static memory and the host's kernel yield, with the host's driver."""
    with torch._C.DisableTorchFunction():
        return served("cpu", 1.0)["static"].tokens


def test_every_allocator_yields_the_hosts_tokens(expected):
    for name, one in served("cuda", 1.0).items():
        assert one.tokens == expected, name
    assert set(launches) >= {"write_tokens", "attend"}


def test_short_of_memory_too(expected):
    """Requests are preempted, their rows' memory is unmapped, and they come back."""
    replays = served("cuda", 0.4, left_out="static")
    assert replays["vattention"].preemptions > 0
    for name, one in replays.items():
        assert one.tokens == expected, name
