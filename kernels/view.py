"""What a kernel is handed: the K/V of one layer, and where one step's sequences lie in it.

Two layouts. B sequences, H KV heads, D head size:

    contiguous   k, v: [R, S, H, D]   sequence b owns row rows[b]; position p is k[rows[b], p]
    paged        k, v: [N, P, H, D]   N blocks of P tokens; position p is k[block_table[b, p // P], p % P]

Only the last two dimensions are dense. Strides of the first two are free: a vAttention row is rounded up to
whole page-groups, a tensor-sliced layer strides over its neighbours, and rows of a buddy allocator overlap
(stride(0) is one block, and a row is "everything from here on").
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvarena.kernels.layout import Layout


@dataclass(frozen=True, slots=True)
class LayerCache:
    """K and V of one layer; the shapes are drawn in the module's docstring."""

    layout: Layout
    k: Tensor
    v: Tensor

    @property
    def block_size(self) -> int:
        """Tokens of a block (paged), or of a row (contiguous)."""
        return self.k.shape[1]

    @property
    def num_kv_heads(self) -> int:
        """Number of KV heads."""
        return self.k.shape[2]

    @property
    def head_size(self) -> int:
        """Elements of one head's key."""
        return self.k.shape[3]


@dataclass(frozen=True, slots=True)
class BatchView:
    """Where the K/V of each sequence of one kernel call lies, and which queries it brings.

    A decode call has one query per sequence. A prefill call has `query_starts[b+1] - query_starts[b]` queries
    for sequence b, and they are the *last* tokens of its `lengths[b]`: query i of n sees the first
    `lengths[b] - n + i + 1` positions (causal, aligned to the end; a chunk of a prompt needs nothing more).
    """

    lengths: Tensor  # [B] int32: tokens in the cache, those appended in this step included
    query_starts: Tensor  # [B + 1] int32: sequence b owns queries [query_starts[b], query_starts[b + 1])
    rows: Tensor | None  # [B] int32, contiguous only
    block_table: Tensor | None  # [B, max blocks] int32, paged only; entries past the length are undefined
    max_length: int  # max(lengths), known on the host without a device synchronisation
    max_queries: int  # longest run of queries; 1 for decode

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return self.lengths.shape[0]

    @property
    def is_decode(self) -> bool:
        """True where every sequence brings exactly one query."""
        return self.max_queries == 1


def positions(view: BatchView) -> Tensor:
    """Position of every query in its sequence: [T] int64."""
    counts = (view.query_starts[1:] - view.query_starts[:-1]).to(torch.int64)  # [B]
    first = view.lengths.to(torch.int64) - counts  # [B]: position of each sequence's first query
    starts = view.query_starts[:-1].to(torch.int64)
    index = torch.arange(int(view.query_starts[-1]), device=view.lengths.device)
    return index + torch.repeat_interleave(first - starts, counts)
