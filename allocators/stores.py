"""The store that fits a policy."""

import torch

from kvarena.allocators.memory.model_shape import ModelShape
from kvarena.allocators.memory.store import Store
from kvarena.allocators.paged.store import PagedStore
from kvarena.allocators.policy import Policy
from kvarena.allocators.reservation.store import ReservedStore
from kvarena.allocators.vattention.store import VirtualStore
from kvarena.kernels.layout import Layout


def make_store(
    policy: Policy,
    num_layers: int,
    num_kv_heads: int,
    head_size: int,
    dtype: torch.dtype | str,
    device: torch.device | str = "cpu",
) -> Store:
    """Real memory for one model's KV cache under `policy`.

    Raises UserError where the pool does not fit the machine, the policy's KV layout is one that only a modelled clock
    runs, or no driver serves the device.
    """
    resolved = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    shape = ModelShape(num_layers, num_kv_heads, head_size, resolved)
    if policy.geometries:
        return VirtualStore(policy, shape, device=device)
    kind = PagedStore if policy.memory_layout is Layout.PAGED else ReservedStore
    return kind(policy, shape, device)
