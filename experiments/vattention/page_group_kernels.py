"""Kernels over rows mapped with page-groups of two sizes (vAttention Fig 14): the same bytes, the same addresses apart.

Page-groups are mapped in a random order, so that the smaller ones really lie scattered.
"""

import random
from collections.abc import Sequence
from contextlib import ExitStack, closing
from statistics import median
from typing import NamedTuple

import pandas as pd
import torch

from kvarena.allocators.sizes import round_up
from kvarena.allocators.vmm.drivers import make_driver
from kvarena.allocators.vmm.tensor import strided_tensor
from kvarena.experiments.kit.attention_time import Call, seconds_per_call
from kvarena.harness.model.config import ModelConfig
from kvarena.harness.record.record import Frames
from kvarena.kernels.kernel import AttentionKernel
from kvarena.kernels.layout import Layout
from kvarena.kernels.registry import get_kernel
from kvarena.kernels.view import BatchView, LayerCache

TURNS = 3  # of which a round takes the median


class Point(NamedTuple):
    """One call: so many sequences of so many tokens, decoded or prefilled whole."""

    phase: str  # prefill or decode
    batch: int
    context: int

    @property
    def x(self) -> int:
        """What Fig 14 has on its axis."""
        return self.context if self.phase == "prefill" else self.batch

    @property
    def repeats(self) -> int:
        """Calls that a sample is the mean of: small batches are over too soon."""
        return 1 if self.phase == "prefill" else max(1, 16 // self.batch)


class MappedRows:
    """K and V of one layer, in rows of page-groups of one size."""

    def __init__(self, model: ModelConfig, batch: int, context: int, page_group: int, device: torch.device) -> None:
        self._driver = make_driver(device, page_group)
        dtype = getattr(torch, model.dtype)
        token = model.num_kv_heads * model.head_size * dtype.itemsize
        row_bytes = round_up(context * token, page_group)
        strides = (row_bytes, token, model.head_size * dtype.itemsize, dtype.itemsize)
        shape = (batch, context, model.num_kv_heads, model.head_size)
        generator = torch.Generator().manual_seed(model.seed)
        try:
            k, v = (self._tensor(batch * row_bytes, page_group, dtype, shape, strides) for _ in range(2))
            for x in (k, v):
                x.copy_(torch.randn(shape, generator=generator))
        except BaseException:
            self._driver.close()
            raise
        self.cache = LayerCache(Layout.CONTIGUOUS, k, v)

    def _tensor(
        self, num_bytes: int, page_group: int, dtype: torch.dtype, shape: Sequence[int], strides: Sequence[int]
    ) -> torch.Tensor:
        base = self._driver.reserve(num_bytes)
        handles = self._driver.create(num_bytes // page_group)
        random.Random(page_group).shuffle(handles)
        self._driver.map(base, 0, handles)
        return strided_tensor(self._driver, base, dtype, shape, strides)

    def close(self) -> None:
        """Give the memory back."""
        self._driver.close()


def measure(
    model: ModelConfig, kernel_name: str, points: Sequence[Point], page_groups: Sequence[int], rounds: int, device: str
) -> Frames:
    """Seconds of one call by point, page-group and round.

    Every round maps fresh memory, first for the one size, then for the other, and the next round the other way about:
    which physical pages a pool gets, and so how fast it is read, depends on what was created before it. Raises
    RuntimeError where a kernel's output depends on the page-group.
    """
    kernel, samples = get_kernel(kernel_name), []
    for point in points:
        for number in range(rounds):
            sizes = page_groups[:: 1 if number % 2 else -1]
            for size, seconds in _round(model, kernel, point, sizes, torch.device(device)).items():
                samples.append({**point._asdict(), "page_group": size, "round": number, "call_s": seconds})
    return {"kernel_calls": pd.DataFrame(samples)}


def _round(
    model: ModelConfig, kernel: AttentionKernel, point: Point, sizes: Sequence[int], device: torch.device
) -> dict[int, float]:
    """Seconds of one call by page-group: the median of a few, taken in turn."""
    with ExitStack() as stack:
        timers, outputs = {}, []
        for size in sizes:
            rows = stack.enter_context(closing(MappedRows(model, point.batch, point.context, size, device)))
            call, out = _call(model, kernel, rows.cache, point)
            timers[size] = seconds_per_call([call] * point.repeats, device, kernel.spec.in_graph)
            outputs.append(out)
        if not all(torch.equal(outputs[0], out) for out in outputs):
            raise RuntimeError(f"{kernel.spec.name}, {point}: another output over another page-group")
        taken = [{size: timers[size]() for size in sizes} for _ in range(TURNS)]
        return {size: median(turn[size] for turn in taken) for size in sizes}


def _call(model: ModelConfig, kernel: AttentionKernel, cache: LayerCache, point: Point) -> tuple[Call, torch.Tensor]:
    """The call, and where it writes."""
    queries = point.context if point.phase == "prefill" else 1
    device, dtype = cache.k.device, cache.k.dtype
    view = BatchView(
        lengths=torch.full((point.batch,), point.context, dtype=torch.int32, device=device),
        query_starts=torch.arange(0, (point.batch + 1) * queries, queries, dtype=torch.int32, device=device),
        rows=torch.arange(point.batch, device=device), block_table=None, max_length=point.context, max_queries=queries,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(model.seed + 1)
    shape = (point.batch * queries, model.num_heads, model.head_size)
    q = torch.randn(shape, generator=generator).to(device, dtype)
    out = torch.empty_like(q)
    attend = kernel.prefill if point.phase == "prefill" else kernel.decode
    return (lambda: attend(q, cache, view, out)), out
