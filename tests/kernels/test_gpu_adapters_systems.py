"""The systems of conf/system: each is a pair that fits, and only our own kernels are one body."""

import pytest
from omegaconf import OmegaConf

from kvarena.allocators.registry import memory_layout
from kvarena.harness.config import load, names
from kvarena.kernels.layout import Layout
from kvarena.kernels.registry import fits, kernel_spec

SYSTEMS = {name: load("system", name) for name in names("system")}


@pytest.mark.parametrize("name", SYSTEMS)
def test_allocator_and_kernel_fit(name):
    system = SYSTEMS[name]
    allocator = OmegaConf.merge(load("allocator", system.allocator.name), system.allocator)
    layout = memory_layout(allocator.name)
    block_size = allocator.get("block_size") if layout is Layout.PAGED else None
    assert fits(kernel_spec(system.kernel.name), layout, block_size=block_size) is None


@pytest.mark.parametrize("name", [name for name, system in SYSTEMS.items() if system.pairing == "same body"])
def test_only_our_own_kernels_are_one_body(name):
    spec = kernel_spec(SYSTEMS[name].kernel.name)
    assert spec.library == "kvarena"
    assert spec.layouts == set(Layout)
