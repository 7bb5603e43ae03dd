"""The KV layout of a model as data: what one token costs, in which tensors.

A layout is a list of groups of layers. A group holds `num_tensors` tensors (K and V of each of its layers, or one
latent tensor per layer) and every tensor takes `token_bytes` for one token. Policies see nothing else of a model.
"""

from dataclasses import dataclass
from enum import StrEnum


class KVKind(StrEnum):
    """What a group of layers remembers."""

    FULL = "full"  # every position
    SLIDING = "sliding"  # the last `window` positions, in a ring of that size
    LATENT = "latent"  # every position, compressed (MLA): one tensor instead of K and V


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers that cache alike."""

    kind: KVKind
    num_layers: int
    tensors_per_layer: int  # 2: K and V apart; 1: one tensor
    token_bytes: int  # of one token in one tensor of one layer
    dtype: str
    window: int | None = None  # tokens; sliding only

    @property
    def num_tensors(self) -> int:
        """Tensors of the group over all its layers."""
        return self.num_layers * self.tensors_per_layer

    def resident_tokens(self, length: int) -> int:
        """Positions that a sequence of `length` tokens keeps: a window is a ring buffer."""
        return length if self.window is None else min(length, self.window)


@dataclass(frozen=True, slots=True)
class KVLayout:
    """What one token of one sequence costs."""

    groups: tuple[LayerGroup, ...]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all tensors, before any window binds."""
        return sum(group.num_tensors * group.token_bytes for group in self.groups)

    @property
    def has_windows(self) -> bool:
        """Whether any layer forgets old positions."""
        return any(group.window is not None for group in self.groups)

    def resident_bytes(self, length: int) -> int:
        """Bytes of K/V of a sequence of `length` tokens."""
        return sum(g.num_tensors * g.token_bytes * g.resident_tokens(length) for g in self.groups)


_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8": 1}


def attention_layout(num_layers: int, num_kv_heads: int, head_size: int, dtype: str = "float16") -> KVLayout:
    """Layout of plain attention: MHA and GQA differ in the number of KV heads alone."""
    token_bytes = num_kv_heads * head_size * _DTYPE_BYTES[dtype]
    return KVLayout((LayerGroup(KVKind.FULL, num_layers, 2, token_bytes, dtype),))


def latent_layout(num_layers: int, latent_size: int, dtype: str = "bfloat16") -> KVLayout:
    """Layout of multi-head latent attention: `latent_size` elements (compressed KV + rotary key) per layer."""
    return KVLayout((LayerGroup(KVKind.LATENT, num_layers, 1, latent_size * _DTYPE_BYTES[dtype], dtype),))


def sliding_layout(
    num_full: int, num_sliding: int, window: int, num_kv_heads: int, head_size: int, dtype: str = "bfloat16"
) -> KVLayout:
    """Layout of a model that mixes full layers with layers that see only the last `window` positions."""
    token_bytes = num_kv_heads * head_size * _DTYPE_BYTES[dtype]
    return KVLayout(
        (
            LayerGroup(KVKind.FULL, num_full, 2, token_bytes, dtype),
            LayerGroup(KVKind.SLIDING, num_sliding, 2, token_bytes, dtype, window),
        )
    )
