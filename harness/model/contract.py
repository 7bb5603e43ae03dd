"""What an executor and a model owe each other."""

from typing import Protocol

import torch
from torch import Tensor

from kvarena.harness.model.config import ModelConfig


class Attend(Protocol):
    """Appends this step's K/V of one layer to the cache, then attends: the executor's half of a forward pass."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Take q [T, Hq, D] and k, v [T, Hkv, D], return the attention's output [T, Hq, D].

        q is dense; k and v are dense in their last two dimensions. Softmax scale 1 / sqrt(D).
        """
        ...


class Model(Protocol):
    """A decoder without a cache of its own: it sees the packed tokens of one step and calls `attend` in each layer."""

    config: ModelConfig  # as it runs here: sizes are the shard's, where it is one
    device: torch.device

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend, logits_at: Tensor) -> Tensor:
        """Run one step over the tokens of all its sequences, prompts and decodes mixed.

        tokens, positions: [T] int64, packed sequence after sequence. logits_at: [B] int64, indices into T of the
        tokens whose logits are wanted (the last of each sequence). Returns logits [B, V] in the model's dtype.
        """
        ...
