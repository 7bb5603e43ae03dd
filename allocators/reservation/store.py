"""The store of contiguous, reserved memory: static reservation, Orca, FasterTransformer.

Every layer has a K and a V tensor over T tokens of the pool, [T, H, D]. A row begins every `row_tokens` tokens and is
"everything from here on", up to `max_tokens`: rows of a static policy lie side by side, those of a buddy allocator
begin at any block and overlap.

    static  row_tokens = max_tokens        |row 0.........|row 1.........|row 2.........|
    orca    row_tokens = block_size        |row 0.........|
                                               |row 1.........|
                                                   |row 2.........|
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from kvarena.allocators.memory.byte_copies import ByteCopies, Runs
from kvarena.allocators.memory.device_view import view_maker
from kvarena.allocators.memory.model_shape import ModelShape
from kvarena.allocators.memory.resident_store import ResidentStore
from kvarena.allocators.policy import Action, Policy
from kvarena.allocators.vmm.tensor import strided_tensor
from kvarena.kernels.layout import Layout
from kvarena.kernels.view import BatchView, LayerCache


class RowPolicy(Protocol):
    """A contiguous policy, as this store sees it."""

    max_tokens: int
    row_tokens: int  # tokens from one row to the next

    def row(self, seq_id: int) -> int:
        """Index of a sequence's row."""
        ...


class ReservedStore(ResidentStore):
    """Contiguous rows over a resident pool."""

    def __init__(self, policy: Policy, shape: ModelShape, device: torch.device | str = "cpu") -> None:
        """Raises UserError where the pool does not fit the machine, or the policy's layout not the model."""
        rows: RowPolicy = policy  # type: ignore[assignment]  # a policy of contiguous rows
        self._policy = rows
        num_layers = shape.num_layers
        num_rows = policy.pool_bytes // policy.kv_layout.token_bytes // rows.row_tokens
        tensor_tokens = num_rows * rows.row_tokens
        last_row_end = (num_rows - 1) * rows.row_tokens + rows.max_tokens  # may lie past the tensor, and the pool
        tensor_bytes = tensor_tokens * shape.token_bytes
        addressed_bytes = (2 * num_layers - 1) * tensor_bytes + last_row_end * shape.token_bytes
        super().__init__(policy, shape, addressed_bytes, device)
        self._make_view = view_maker(torch.device(self.driver.device))

        dims = (num_rows, rows.max_tokens, shape.num_kv_heads, shape.head_size)  # [R, S, H, D]
        strides = (rows.row_tokens * shape.token_bytes, shape.token_bytes, *shape.head_strides)
        tensors = [
            strided_tensor(self.driver, self.base + i * tensor_bytes, shape.dtype, dims, strides)
            for i in range(2 * num_layers)
        ]
        self._layers = [LayerCache(Layout.CONTIGUOUS, k, v) for k, v in zip(tensors[::2], tensors[1::2], strict=True)]

        bases = [self.base + i * tensor_bytes for i in range(2 * num_layers)]
        self._copy = ByteCopies(bases, torch.device(self.driver.device))
        self._row_bytes = rows.row_tokens * shape.token_bytes

    def apply(self, actions: Sequence[Action]) -> None:
        """Copy rows, in all layers at once."""
        if actions:
            self._copy(Runs.of_rows(actions, self._row_bytes))

    def layer(self, layer: int) -> LayerCache:
        """K and V of one layer."""
        return self._layers[layer]

    def view(self, seq_ids: Sequence[int], lengths: Sequence[int], num_queries: Sequence[int]) -> BatchView:
        """Rows of these sequences."""
        return self._make_view(lengths, num_queries, rows=[self._policy.row(seq_id) for seq_id in seq_ids])
