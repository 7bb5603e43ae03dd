"""A model over the plainest cache there is: what every allocator and kernel must equal, and the peer tests run."""

from collections.abc import Mapping

import torch
from torch import Tensor

from kvarena.harness.model.contract import Model


class Reference:
    """Runs a model with one K and one V tensor per sequence and layer, and attention by its formula. Slow and exact."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._lengths: dict[int, int] = {}  # tokens in the cache by sequence
        self._kv: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # (layer, sequence) -> k, v [S, Hkv, D]

    def step(self, batch: Mapping[int, Tensor]) -> Tensor:
        """Feed each sequence its next tokens (a prompt, a chunk of one, or one token): logits [B, V] after the last."""
        past = [self._lengths.get(seq_id, 0) for seq_id in batch]
        counts = [len(tokens) for tokens in batch.values()]
        positions = torch.cat([torch.arange(a, a + n) for a, n in zip(past, counts, strict=True)])
        ends = torch.tensor(counts).cumsum(0)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            pieces = zip(batch, *(torch.split(x, counts) for x in (q, k, v)), strict=True)
            return torch.cat([self._attend_one(layer, *piece) for piece in pieces])

        device = self.model.device
        tokens = torch.cat(list(batch.values())).to(device)
        logits = self.model.forward(tokens, positions.to(device), attend, (ends - 1).to(device))
        self._lengths |= {seq_id: a + n for seq_id, a, n in zip(batch, past, counts, strict=True)}
        return logits

    def _attend_one(self, layer: int, seq_id: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if (layer, seq_id) in self._kv:
            old_k, old_v = self._kv[layer, seq_id]
            k, v = torch.cat((old_k, k)), torch.cat((old_v, v))
        self._kv[layer, seq_id] = k, v
        return causal_attention(q, k, v)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the last n of S tokens, each over those up to itself: q [n, Hq, D], k, v [S, Hkv, D]."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)  # [S, Hq, D]
    scores = torch.einsum("nhd,shd->hns", q, k) / q.shape[2] ** 0.5
    future = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).triu(len(k) - len(q) + 1)
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)  # [Hq, n, S]
    return torch.einsum("hns,shd->nhd", weights, v)
