"""How long one call of a decode kernel takes, cold: over more K/V than any cache holds, as layer after layer does.

The same bytes serve as rows and as blocks, in order or scattered:

    rows        k, v: [R, S, H, D]            batch c of B sequences owns rows [c B, (c + 1) B)
    blocks      k, v: [R S / P, P, H, D]      the same memory; a table of S / P blocks per sequence
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvarena.harness.model.config import ModelConfig
from kvarena.kernels.kernel import AttentionKernel
from kvarena.kernels.layout import Layout
from kvarena.kernels.reference import reference_attention
from kvarena.kernels.view import BatchView, LayerCache

# Kernels sum in different orders: their outputs differ from float64's by this part of the largest, at most.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}

USUAL_BLOCK = 16  # tokens: vLLM's, and the one that others are compared with

Call = Callable[[], None]


class Arrangement(NamedTuple):
    """Where a sequence's tokens lie."""

    block_size: int | None  # tokens; None: one row
    scattered: bool = False

    @property
    def layout(self) -> Layout:
        """What a kernel must be able to read."""
        return Layout.CONTIGUOUS if self.block_size is None else Layout.PAGED


class WorkingSet:
    """K/V of one layer for as many batches of equal sequences as fill `num_bytes`."""

    def __init__(self, model: ModelConfig, batch: int, context: int, num_bytes: int, device: torch.device) -> None:
        """Rows are as long as the next power of two, so that every block size divides them."""
        self._model, self._batch, self._context = model, batch, context
        dtype = getattr(torch, model.dtype)
        stride = max(USUAL_BLOCK, 1 << (context - 1).bit_length())  # tokens of a row
        batch_bytes = 2 * batch * stride * model.num_kv_heads * model.head_size * dtype.itemsize
        self.num_batches = max(1, -(-num_bytes // batch_bytes))
        self.bytes_per_call = batch_bytes * context // stride  # of K/V that is read
        generator = torch.Generator().manual_seed(model.seed)
        shape = (self.num_batches * batch, stride, model.num_kv_heads, model.head_size)
        one = torch.randn(2, 1 + batch, *shape[1:], generator=generator).to(device=device, dtype=dtype)
        source = torch.arange(shape[0], device=device) % (1 + batch)  # copies: drawing them all would take seconds
        self._k, self._v = one[0][source], one[1][source]
        self._q = torch.randn(batch, model.num_heads, model.head_size, generator=generator).to(one)
        self._generator = generator

    def calls(self, kernel: AttentionKernel, arrangement: Arrangement) -> list[Call]:
        """One call for each batch of the set, checked against float64 on the first. Raises RuntimeError."""
        cache, views = self._arranged(arrangement)
        out = torch.empty_like(self._q)
        kernel.decode(self._q, cache, views[0], out)
        expected = reference_attention(self._q, cache, views[0])
        gap = float((out.double().cpu() - expected).abs().max() / expected.abs().max())
        if not gap <= TOLERANCE[self._model.dtype]:
            raise RuntimeError(f"{kernel.spec.name} on {arrangement}: off by {gap:.2e} of the largest output")
        return [lambda view=view: kernel.decode(self._q, cache, view, out) for view in views]  # type: ignore[misc]

    def _arranged(self, arrangement: Arrangement) -> tuple[LayerCache, list[BatchView]]:
        size, rows = arrangement.block_size, torch.arange(len(self._k))
        if size is None:
            return LayerCache(Layout.CONTIGUOUS, self._k, self._v), self._views(rows, None)
        cache = LayerCache(Layout.PAGED, *(x.view(-1, size, *x.shape[2:]) for x in (self._k, self._v)))
        blocks = torch.arange(cache.k.shape[0])
        if arrangement.scattered:
            blocks = torch.randperm(len(blocks), generator=self._generator)
        needed = math.ceil(self._context / size)
        return cache, self._views(None, blocks.view(len(self._k), -1)[:, :needed].to(torch.int32))

    def _views(self, rows: Tensor | None, table: Tensor | None) -> list[BatchView]:
        device, size = self._k.device, self._batch
        lengths = torch.full((size,), self._context, dtype=torch.int32, device=device)
        starts = torch.arange(size + 1, dtype=torch.int32, device=device)

        def of(owners: Tensor | None, batch: int) -> Tensor | None:
            return None if owners is None else owners[batch * size : (batch + 1) * size].contiguous().to(device)

        return [
            BatchView(lengths, starts, of(rows, n), of(table, n), self._context, 1) for n in range(self.num_batches)
        ]


def seconds_per_call(calls: Sequence[Call], device: torch.device, in_graph: bool) -> Callable[[], float]:
    """A measurement of the mean over all calls, one after the other.

    On a GPU it is the device's time; where the kernel allows it the calls are replayed as one graph, since launching
    them one by one takes longer than the kernels that are measured here.
    """

    def all_calls() -> None:
        for call in calls:
            call()

    all_calls()
    if device.type != "cuda":
        return lambda: _wall_s(all_calls) / len(calls)
    run = _captured(all_calls) if in_graph else all_calls
    return lambda: _device_s(run) / len(calls)


def _wall_s(run: Call) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _captured(run: Call) -> Call:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _device_s(run: Call) -> float:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / 1e3
