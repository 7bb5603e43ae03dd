"""Views of batches on a GPU: the small tensors lie at fixed addresses, and one asynchronous copy a step fills them.

    int32    | rows, C | lengths, C | query_starts, C + 1 |      for batches of up to C sequences

Fixed, so that a CUDA graph that was captured over a view reads the next step's numbers when it is replayed. There are
two sets, one for decodes and one for prefills: a view holds until the store makes the next one of its kind. The copy
and the kernels are in one stream, so nothing is overwritten that a kernel of the last step still reads.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from kvarena.allocators.memory.batch_view import make_view
from kvarena.allocators.memory.staging import staging_buffer
from kvarena.kernels.view import BatchView

FIRST_CAPACITY = 256  # sequences; a larger batch moves the buffers once, and graphs have to be captured again


class ViewBuffers:
    """The buffers of one kind of batch."""

    def __init__(self, device: torch.device, capacity: int = FIRST_CAPACITY) -> None:
        self._device = device
        self._allocate(capacity)

    def _allocate(self, capacity: int) -> None:
        self._capacity = capacity
        self._words = torch.zeros(3 * capacity + 1, dtype=torch.int32, device=self._device)
        self.rows = self._words[:capacity]
        self.lengths = self._words[capacity : 2 * capacity]
        self.query_starts = self._words[2 * capacity :]

    def fill(self, lengths: Sequence[int], num_queries: Sequence[int], rows: Sequence[int] | None) -> None:
        """Send the numbers of a batch; the host does not wait for them to arrive."""
        batch = len(lengths)
        if batch > self._capacity:
            self._allocate(max(batch, 2 * self._capacity))
        capacity = self._capacity
        buffer, words = staging_buffer(3 * capacity + 1, self._device)
        if rows is not None:
            words[:batch] = rows
        words[capacity : capacity + batch] = lengths
        words[2 * capacity : 2 * capacity + batch + 1] = [0, *accumulate(num_queries)]
        self._words.copy_(buffer, non_blocking=True)


class DeviceViews:
    """Makes the views of one store on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._decode, self._prefill = ViewBuffers(device), ViewBuffers(device)

    def __call__(
        self,
        lengths: Sequence[int],
        num_queries: Sequence[int],
        rows: Sequence[int] | None = None,
        block_table: Tensor | None = None,
    ) -> BatchView:
        """View of a batch; `rows` or `block_table` says where its K/V lie."""
        batch, max_queries = len(lengths), max(num_queries)
        buffers = self._decode if max_queries == 1 else self._prefill
        buffers.fill(lengths, num_queries, rows)
        return BatchView(
            lengths=buffers.lengths[:batch],
            query_starts=buffers.query_starts[: batch + 1],
            rows=None if rows is None else buffers.rows[:batch],
            block_table=block_table,
            max_length=max(lengths),
            max_queries=max_queries,
        )


def view_maker(device: torch.device) -> Callable[..., BatchView]:
    """What makes a store's views: tensors of their own on the host, fixed buffers on a GPU."""
    return make_view if device.type == "cpu" else DeviceViews(device)
