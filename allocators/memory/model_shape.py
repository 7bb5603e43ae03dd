"""What a store must know of the model: the shape of its K/V."""

from dataclasses import dataclass

import torch

from kvarena.allocators.kv_layout import KVLayout, attention_layout
from kvarena.errors import UserError


@dataclass(frozen=True, slots=True)
class ModelShape:
    """N layers of H heads of size D."""

    num_layers: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's K, or V, in one layer."""
        return self.num_kv_heads * self.head_size * self.dtype.itemsize

    @property
    def head_strides(self) -> tuple[int, int]:
        """Strides of the last two dimensions, [..., H, D], in bytes: always dense."""
        return self.head_size * self.dtype.itemsize, self.dtype.itemsize

    def check(self, kv_layout: KVLayout) -> None:
        """Raises UserError where a policy's layout is another model's, or one that only a modelled clock runs."""
        dtype = str(self.dtype).removeprefix("torch.")
        own = attention_layout(self.num_layers, self.num_kv_heads, self.head_size, dtype)
        if kv_layout != own:
            raise UserError(
                f"a store holds plain attention, K and V of every position in every layer ({own}); "
                f"the policy's KV layout is {kv_layout}. Others run under clock=modelled"
            )
