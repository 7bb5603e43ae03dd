"""Decode steps as CUDA graphs: one launch for a forward pass that else launches hundreds of kernels.

A graph reads and writes the addresses that it was captured with. The K/V stay where they are: a store's tensors never
move, and what vAttention maps later lies at addresses that its rows have had all along. What changes from step to step
is copied into buffers of the graph's own before it is replayed:

    tokens [B] int64, lengths [B] int32, and rows [B] or a block table [B, blocks] int32

Kernels cut their work by the longest sequence, so there is one graph for each batch size and each longest length,
rounded up to a power of two, or to the longest that there can be: in every layout alike. Neither paper's engine had
graphs, so they are off unless asked for.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvarena.allocators.memory.staging import indices_on
from kvarena.errors import UserError
from kvarena.kernels.catalogue import CATALOGUE
from kvarena.kernels.kernel import AttentionKernel
from kvarena.kernels.view import BatchView, LayerCache

SHORTEST = 256  # tokens; no graphs for lengths below it alone

Step = Callable[[], Tensor]  # one forward pass over fixed buffers: logits [B, V]
Capture = Callable[[Step], Step]  # what is returned does the same again, sooner
Forward = Callable[[Tensor, Tensor, BatchView, Tensor], Tensor]  # tokens, positions, view, logits_at: logits


class Buffers(NamedTuple):
    """What one graph reads; a view like the store's, at addresses of its own."""

    tokens: Tensor  # [B] int64
    last: Tensor  # [B] int64: the token whose logits are wanted, every one
    view: BatchView

    def fill(self, tokens: Sequence[int], view: BatchView) -> None:
        """Take over what the next step is fed, in stream order."""
        self.tokens.copy_(indices_on(self.tokens.device, tokens))
        self.view.lengths.copy_(view.lengths)
        if view.block_table is not None:
            assert self.view.block_table is not None, "a batch keeps its layout"
            self.view.block_table[:, : view.block_table.shape[1]].copy_(view.block_table)
        else:
            assert self.view.rows is not None, "a batch keeps its layout"
            assert view.rows is not None, "a view has rows or a block table"
            self.view.rows.copy_(view.rows)


class DecodeGraphs:
    """The decode steps of one model, store and kernel."""

    def __init__(
        self, kernel: AttentionKernel, device: torch.device, up_to: int, capture: Capture | None = None
    ) -> None:
        """For sequences of `up_to` tokens at most. On a CPU steps run over the same buffers, uncaptured.

        Raises UserError for a kernel that cannot be held.
        """
        if device.type == "cuda" and not kernel.spec.in_graph:
            able = ", ".join(name for name, (spec, *_) in CATALOGUE.items() if spec.in_graph)
            raise UserError(
                f"engine.cuda_graphs=true: kernel {kernel.spec.name} asks the host in each step, so that no CUDA graph "
                f"can hold it. These can be captured: {able}"
            )
        self._up_to = up_to
        self._capture = capture or (CudaCapture() if device.type == "cuda" else lambda step: step)
        self._graphs: dict[tuple[int, int], tuple[Buffers, Step]] = {}  # (batch size, longest length) -> graph

    def run(self, forward: Forward, tokens: Sequence[int], view: BatchView, cache: LayerCache) -> Tensor:
        """One decode step: logits [B, V], overwritten by the next one. `cache` is any layer's."""
        longest = rounded_up(view.max_length, self._up_to)
        key = view.batch_size, longest
        if key not in self._graphs:
            buffers = _buffers(view, longest, cache)
            buffers.fill(tokens, view)  # a capture runs the step once: on real numbers, which it repeats
            self._graphs[key] = buffers, self._capture(lambda: _step(forward, buffers))
        buffers, replay = self._graphs[key]
        buffers.fill(tokens, view)
        return replay()

    def __len__(self) -> int:
        return len(self._graphs)


def rounded_up(length: int, up_to: int) -> int:
    """The longest length of the graph that serves `length`: a power of two, or the longest that there can be."""
    return min(max(SHORTEST, 1 << (length - 1).bit_length()), max(length, up_to))


def _buffers(view: BatchView, longest: int, cache: LayerCache) -> Buffers:
    batch, device = view.batch_size, view.lengths.device
    table = None
    if view.block_table is not None:
        table = torch.zeros((batch, -(-longest // cache.block_size)), dtype=torch.int32, device=device)
    rows = None if view.rows is None else torch.zeros_like(view.rows)
    fixed = BatchView(view.lengths.clone(), view.query_starts.clone(), rows, table, longest, max_queries=1)
    last = torch.arange(batch, device=device)
    return Buffers(torch.zeros_like(last), last, fixed)


def _step(forward: Forward, buffers: Buffers) -> Tensor:
    """A decode's token is its sequence's last: its position is one less than the length."""
    return forward(buffers.tokens, buffers.view.lengths.to(torch.int64) - 1, buffers.view, buffers.last)


class CudaCapture:
    """Captures steps; their graphs share one pool of memory, since they never run at once."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        """Run the step once, so that kernels are compiled and workspaces there, then capture it."""
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # thread_local: the thread that maps page-groups meanwhile is no part of the capture, and may go on.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = step()

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay
