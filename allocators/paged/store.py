"""The store of paged memory: every layer has a K and a V tensor of N blocks of P tokens, [N, P, H, D]."""

from collections.abc import Sequence
from typing import Protocol

import torch

from kvarena.allocators.memory.byte_copies import ByteCopies, Runs
from kvarena.allocators.memory.device_view import FIRST_CAPACITY, view_maker
from kvarena.allocators.memory.model_shape import ModelShape
from kvarena.allocators.memory.resident_store import ResidentStore
from kvarena.allocators.paged.batch_table import BlockTable, DeviceBlockTable
from kvarena.allocators.paged.block_copies import batches
from kvarena.allocators.paged.swap_space import SwapSpace
from kvarena.allocators.policy import Action, CopyBlock, Policy, SwapOut
from kvarena.allocators.vmm.tensor import strided_tensor
from kvarena.kernels.layout import Layout
from kvarena.kernels.view import BatchView, LayerCache


class BlockPolicy(Protocol):
    """A paged policy, as this store sees it."""

    num_blocks: int
    block_size: int  # tokens
    max_tokens: int  # of a sequence

    def block_table(self, seq_id: int) -> list[int]:
        """Blocks of a sequence, in the order of its positions."""
        ...


class PagedStore(ResidentStore):
    """Blocks over a resident pool."""

    def __init__(self, policy: Policy, shape: ModelShape, device: torch.device | str = "cpu") -> None:
        """Raises UserError where the pool does not fit the machine, or the policy's layout not the model."""
        blocks: BlockPolicy = policy  # type: ignore[assignment]  # a policy of blocks
        self._policy = blocks
        super().__init__(policy, shape, policy.pool_bytes, device)
        num_layers = shape.num_layers
        block_bytes = blocks.block_size * shape.token_bytes
        tensor_bytes = blocks.num_blocks * block_bytes
        dims = (2 * num_layers, blocks.num_blocks, blocks.block_size, shape.num_kv_heads, shape.head_size)
        strides = (tensor_bytes, block_bytes, shape.token_bytes, *shape.head_strides)
        self._blocks = strided_tensor(self.driver, self.base, shape.dtype, dims, strides)  # [2 * layers, N, P, H, D]
        self._layers = [
            LayerCache(Layout.PAGED, self._blocks[2 * n], self._blocks[2 * n + 1]) for n in range(num_layers)
        ]
        self._block_bytes = block_bytes
        self._copy = ByteCopies([self.base + i * tensor_bytes for i in range(2 * num_layers)], self._blocks.device)
        self._swapped = SwapSpace(policy.swapping.num_blocks if policy.swapping else 0, self._blocks)
        self._make_view = view_maker(self._blocks.device)
        self._decode_table, self._prefill_table = self._make_table(), self._make_table()

    def _make_table(self) -> BlockTable | DeviceBlockTable:
        if self._blocks.device.type == "cpu":
            return BlockTable()
        longest = -(-self._policy.max_tokens // self._policy.block_size)
        return DeviceBlockTable(self._blocks.device, FIRST_CAPACITY, longest)

    def layer(self, layer: int) -> LayerCache:
        """K and V of one layer."""
        return self._layers[layer]

    def apply(self, actions: Sequence[Action]) -> None:
        """Copy and swap blocks, in all layers at once."""
        for kind, sources, targets in batches(actions):
            if kind is CopyBlock:
                self._copy(Runs.of_blocks(sources, targets, self._block_bytes))
            elif kind is SwapOut:
                self._swapped.swap_out(sources, targets)
            else:
                self._swapped.swap_in(sources, targets)

    def view(self, seq_ids: Sequence[int], lengths: Sequence[int], num_queries: Sequence[int]) -> BatchView:
        """Block tables of these sequences."""
        table = self._decode_table if max(num_queries) == 1 else self._prefill_table
        blocks = [self._policy.block_table(seq_id) for seq_id in seq_ids]
        return self._make_view(lengths, num_queries, block_table=table.update(blocks))
