"""The OPT family: LayerNorm before each half, learned positions, ReLU, one KV head per query head, biases."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvarena.harness.model.config import ModelConfig
from kvarena.harness.model.contract import Attend
from kvarena.harness.model.parameters import POSITION_OFFSET
from kvarena.harness.model.weights import Weights, layer_weights


@dataclass(frozen=True, slots=True)
class OPTLayer:
    """Weights of one layer. Projections are [outputs, inputs], h is the hidden size, f that of the feed-forward."""

    attention_norm_weight: Tensor  # [h]
    attention_norm_bias: Tensor  # [h]
    qkv_weight: Tensor  # [3 H D, h]
    attention_out_weight: Tensor  # [h, H D]
    mlp_norm_weight: Tensor  # [h]
    mlp_norm_bias: Tensor  # [h]
    up_weight: Tensor  # [f, h]
    down_weight: Tensor  # [h, f]
    qkv_bias: Tensor | None = None  # [3 H D]
    attention_out_bias: Tensor | None = None  # [h]
    up_bias: Tensor | None = None  # [f]
    down_bias: Tensor | None = None  # [h]


class OPT:
    """An OPT decoder (contract: `contract.Model`)."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        self.embedding = weights["embedding"]  # [V, h]
        self.positions = weights["positions"]  # [max_tokens + 2, h]
        self.layers = [OPTLayer(**layer_weights(weights, layer)) for layer in range(config.num_layers)]
        self.final_norm_weight, self.final_norm_bias = weights["final_norm.weight"], weights["final_norm.bias"]  # [h]
        self.output = self.embedding if config.tied_embeddings else weights["output"]  # [V, h]
        self.device = self.embedding.device

    @torch.inference_mode()
    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend, logits_at: Tensor) -> Tensor:
        """Run one step; see `contract.Model`."""
        x = self.embedding[tokens] + self.positions[positions + POSITION_OFFSET]  # [T, h]
        for index, layer in enumerate(self.layers):
            x = x + self._attention(index, layer, x, attend)
            x = x + self._mlp(layer, x)
        return F.linear(self._norm(x[logits_at], self.final_norm_weight, self.final_norm_bias), self.output)  # [B, V]

    def _attention(self, index: int, layer: OPTLayer, x: Tensor, attend: Attend) -> Tensor:
        normed = self._norm(x, layer.attention_norm_weight, layer.attention_norm_bias)
        qkv = F.linear(normed, layer.qkv_weight, layer.qkv_bias)
        q, k, v = qkv.view(len(x), 3, self.config.num_heads, self.config.head_size).unbind(1)  # [T, H, D] each
        attended = attend(index, q.contiguous(), k, v)  # [T, H, D]
        return F.linear(attended.flatten(1), layer.attention_out_weight, layer.attention_out_bias)

    def _mlp(self, layer: OPTLayer, x: Tensor) -> Tensor:
        normed = self._norm(x, layer.mlp_norm_weight, layer.mlp_norm_bias)
        return F.linear(F.relu(F.linear(normed, layer.up_weight, layer.up_bias)), layer.down_weight, layer.down_bias)

    def _norm(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, weight.shape, weight, bias, self.config.norm_eps)
