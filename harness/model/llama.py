"""The Llama family (Llama, Yi): RMSNorm before each half, rotary positions, SwiGLU, grouped query heads."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvarena.harness.model.config import ModelConfig
from kvarena.harness.model.contract import Attend
from kvarena.harness.model.weights import Weights, layer_weights


@dataclass(frozen=True, slots=True)
class LlamaLayer:
    """Weights of one layer. Projections are [outputs, inputs], h is the hidden size, f that of the feed-forward."""

    attention_norm: Tensor  # [h]
    qkv: Tensor  # [(Hq + 2 Hkv) D, h]
    attention_out: Tensor  # [h, Hq D]
    mlp_norm: Tensor  # [h]
    gate_up: Tensor  # [2 f, h]
    down: Tensor  # [h, f]


class Llama:
    """A Llama decoder (contract: `contract.Model`)."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        self.embedding = weights["embedding"]  # [V, h]
        self.layers = [LlamaLayer(**layer_weights(weights, layer)) for layer in range(config.num_layers)]
        self.final_norm = weights["final_norm"]  # [h]
        self.output = self.embedding if config.tied_embeddings else weights["output"]  # [V, h]
        self.device = self.embedding.device
        assert config.rope_theta is not None
        exponents = torch.arange(0, config.head_size, 2, dtype=torch.float32, device=self.device) / config.head_size
        self.frequencies = 1.0 / config.rope_theta**exponents  # [D / 2]

    @torch.inference_mode()
    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend, logits_at: Tensor) -> Tensor:
        """Run one step; see `contract.Model`."""
        cos, sin = self._rotation(positions)
        x = self.embedding[tokens]  # [T, h]
        for index, layer in enumerate(self.layers):
            x = x + self._attention(index, layer, x, cos, sin, attend)
            x = x + self._mlp(layer, x)
        return F.linear(self._norm(x[logits_at], self.final_norm), self.output)  # [B, V]

    def _attention(self, index: int, layer: LlamaLayer, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        num_heads, num_kv_heads = self.config.num_heads, self.config.num_kv_heads
        qkv = F.linear(self._norm(x, layer.attention_norm), layer.qkv)
        heads = qkv.view(len(x), num_heads + 2 * num_kv_heads, self.config.head_size)
        q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)  # [T, Hq, D], [T, Hkv, D] twice
        attended = attend(index, _rotate(q, cos, sin), _rotate(k, cos, sin), v)  # [T, Hq, D]
        return F.linear(attended.flatten(1), layer.attention_out)

    def _mlp(self, layer: LlamaLayer, x: Tensor) -> Tensor:
        gate, up = F.linear(self._norm(x, layer.mlp_norm), layer.gate_up).chunk(2, dim=-1)  # [T, f] twice
        return F.linear(F.silu(gate) * up, layer.down)

    def _norm(self, x: Tensor, scale: Tensor) -> Tensor:
        return F.rms_norm(x, scale.shape, scale, self.config.norm_eps)

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of this step's positions, [T, 1, D] each; shared by all layers.

        Computed per step: a table over 200,000 positions would take 200 MB, and these are a few operations a step.
        """
        angles = positions[:, None].to(torch.float32) * self.frequencies  # [T, D / 2]
        cos, sin = angles.cos(), angles.sin()
        dtype = self.embedding.dtype
        return torch.cat((cos, cos), -1)[:, None].to(dtype), torch.cat((-sin, sin), -1)[:, None].to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + D/2]) by its angle; rolling by D/2 swaps them, and `sin` carries the sign."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin
