"""The store that fits a policy."""

from collections.abc import Callable

import torch

from kvarena.allocators.memory.model_shape import ModelShape
from kvarena.allocators.memory.store import Store
from kvarena.allocators.paged.store import PagedStore
from kvarena.allocators.policy import Policy
from kvarena.allocators.reservation.store import ReservedStore
from kvarena.allocators.vattention.store import VirtualStore
from kvarena.errors import UserError
from kvarena.kernels.layout import Layout

_KINDS: dict[Layout, tuple[Callable[[Policy, ModelShape, torch.device | str], Store], tuple[str, ...]]] = {
    Layout.PAGED: (PagedStore, ("block_size", "num_blocks", "max_tokens", "block_table")),
    Layout.CONTIGUOUS: (ReservedStore, ("row_tokens", "max_tokens", "row")),
}


def make_store(
    policy: Policy,
    num_layers: int,
    num_kv_heads: int,
    head_size: int,
    dtype: torch.dtype | str,
    device: torch.device | str = "cpu",
) -> Store:
    """Real memory for one model's KV cache under `policy`.

    Raises UserError where a policy lacks what its store asks for, where the pool does not fit the machine, the policy's
    KV layout is one that only a modelled clock runs, or no driver serves the device.
    """
    resolved = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    shape = ModelShape(num_layers, num_kv_heads, head_size, resolved)
    if policy.geometries:
        return VirtualStore(policy, shape, device=device)
    kind, asked = _KINDS[policy.memory_layout]
    if lacking := [name for name in asked if getattr(policy, name, None) is None]:
        raise UserError(f"allocator {policy.name}: memory_layout is {policy.memory_layout}, and it lacks "
                        f"{', '.join(lacking)} of what its store asks for: {', '.join(asked)}")  # fmt: skip
    return kind(policy, shape, device)
