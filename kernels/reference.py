"""Attention in float64, one sequence and one head at a time: what every kernel is held to."""

import math

import torch
from torch import Tensor

from kvarena.kernels.view import BatchView, LayerCache


def reference_attention(q: Tensor, cache: LayerCache, view: BatchView) -> Tensor:
    """Attend causally, aligned to the end: q is [T, Hq, D]; the result is float64 and lies on the CPU.

    The device that holds the cache reckons it: a CPU takes a second for 65,536 tokens.
    """
    out = torch.empty(q.shape, dtype=torch.float64)
    starts, lengths = view.query_starts.tolist(), view.lengths.tolist()
    for b, length in enumerate(lengths):
        run = slice(starts[b], starts[b + 1])
        k, v = (gathered(x, view, b, length) for x in (cache.k, cache.v))
        out[run] = attend_sequence(q[run].double(), k, v)
    return out


def attend_sequence(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with the last n tokens: q is [n, Hq, D]; k, v are [L, H, D]; all float64."""
    (n, query_heads, size), (length, heads, _) = q.shape, k.shape
    k, v = (x.repeat_interleave(query_heads // heads, dim=1) for x in (k, v))
    scores = torch.einsum("nhd,lhd->hnl", q, k) / math.sqrt(size)
    future = torch.ones(n, length, dtype=torch.bool, device=q.device).triu(length - n + 1)
    return torch.einsum("hnl,lhd->nhd", scores.masked_fill(future, -math.inf).softmax(-1), v)


def gathered(x: Tensor, view: BatchView, sequence: int, length: int) -> Tensor:
    """K or V of one sequence, read by the layouts' definition: [length, H, D] float64."""
    position = torch.arange(length, device=x.device)
    if view.block_table is not None:
        block = view.block_table[sequence, position // x.shape[1]].to(torch.int64)
        return x[block, position % x.shape[1]].double()
    assert view.rows is not None, "a view has rows or a block table"
    return x[view.rows[sequence], position].double()
