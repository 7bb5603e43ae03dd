"""The store of paged memory: every layer has a K and a V tensor of N blocks of P tokens, [N, P, H, D]."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kvarena.allocators.batch_view import make_view
from kvarena.allocators.block_copies import batches
from kvarena.allocators.model_shape import ModelShape
from kvarena.allocators.policy import Action, Policy, SwapIn, SwapOut
from kvarena.allocators.resident_store import ResidentStore
from kvarena.allocators.vmm.tensor import strided_tensor
from kvarena.kernels.layout import Layout
from kvarena.kernels.view import BatchView, LayerCache


class BlockPolicy(Protocol):
    """A paged policy, as this store sees it."""

    num_blocks: int
    block_size: int  # tokens

    def block_table(self, seq_id: int) -> list[int]:
        """Blocks of a sequence, in the order of its positions."""
        ...


class PagedStore(ResidentStore):
    """Blocks over a resident pool."""

    def __init__(self, policy: Policy, num_layers: int, num_kv_heads: int, head_size: int, dtype: torch.dtype) -> None:
        """Raises UserError where the pool does not fit the machine, or the policy's layout not the model."""
        blocks: BlockPolicy = policy  # type: ignore[assignment]  # a policy of blocks
        self._policy = blocks
        shape = ModelShape(num_layers, num_kv_heads, head_size, dtype)
        super().__init__(policy, shape, policy.pool_bytes)
        block_bytes = blocks.block_size * shape.token_bytes
        tensor_bytes = blocks.num_blocks * block_bytes
        dims = (2 * num_layers, blocks.num_blocks, blocks.block_size, num_kv_heads, head_size)
        strides = (tensor_bytes, block_bytes, shape.token_bytes, *shape.head_strides)
        self._blocks = strided_tensor(self.driver, self.base, dtype, dims, strides)  # [2 * layers, N, P, H, D]
        self._layers = [
            LayerCache(Layout.PAGED, self._blocks[2 * n], self._blocks[2 * n + 1]) for n in range(num_layers)
        ]
        swapped_blocks: int = getattr(policy, "num_cpu_blocks", 0)
        self._swapped = torch.zeros((dims[0], swapped_blocks, *dims[2:]), dtype=dtype)  # the CPU pool, touched
        self._decode_table, self._prefill_table = BlockTable(), BlockTable()

    def layer(self, layer: int) -> LayerCache:
        """K and V of one layer."""
        return self._layers[layer]

    def apply(self, actions: Sequence[Action]) -> None:
        """Copy and swap blocks, in all layers at once."""
        for kind, sources, targets in batches(actions):
            into = self._swapped if kind is SwapOut else self._blocks
            out_of = self._swapped if kind is SwapIn else self._blocks
            into[:, targets] = out_of[:, sources]

    def view(self, seq_ids: Sequence[int], lengths: Sequence[int], num_queries: Sequence[int]) -> BatchView:
        """Block tables of these sequences."""
        table = self._decode_table if max(num_queries) == 1 else self._prefill_table
        blocks = [self._policy.block_table(seq_id) for seq_id in seq_ids]
        return make_view(lengths, num_queries, block_table=table.update(blocks))


class BlockTable:
    """The block table of the last batch, kept because the next one is nearly the same.

    Comparing a sequence's blocks with those of the last step costs a hundredth of writing them out; where they grew,
    only the new ones are written. A batch in another order is correct, only slower.
    """

    def __init__(self) -> None:
        self._known: list[list[int]] = []  # what each row of the array holds
        self._array = np.zeros((0, 0), dtype=np.int32)

    def update(self, blocks: Sequence[list[int]]) -> Tensor:
        """[B, longest] int32, a tensor of its own: a view stays valid whatever comes after it."""
        width = max(map(len, blocks))
        self._reserve(len(blocks), width)
        for row, (known, now) in enumerate(zip(self._known, blocks, strict=False)):
            if known != now:
                same = len(known) if known == now[: len(known)] else 0
                self._array[row, same : len(now)] = now[same:]
                self._known[row] = now.copy()
        return torch.from_numpy(self._array[: len(blocks), :width].copy())

    def _reserve(self, rows: int, width: int) -> None:
        """Double the array where it is too small."""
        old_rows, old_width = self._array.shape
        if rows > old_rows or width > old_width:
            grown = np.zeros((max(rows, 2 * old_rows), max(width, 2 * old_width)), dtype=np.int32)
            grown[:old_rows, :old_width] = self._array
            self._array = grown
            self._known += [[] for _ in range(len(grown) - old_rows)]
