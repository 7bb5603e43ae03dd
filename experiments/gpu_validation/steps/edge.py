"""Whether a kernel touches memory past the mapped end of a vAttention row.

    row 0   |=========|=========|=========|
    row 1   |=========|         .         |     sequences end where the mapped memory ends;
    row 2   |=========|=========|         |     past it there are addresses with nothing behind them

A kernel that reads a tile to its end faults here, and the process is lost: that is the answer. With one page-group
more mapped, the same must pass. Lengths just short of the edge do not matter: a tile that ends past it is worst.
"""

from contextlib import closing
from itertools import accumulate

import torch
from torch import Tensor

from kvarena.allocators.memory.batch_view import make_view
from kvarena.allocators.vmm.driver import Driver
from kvarena.allocators.vmm.drivers import make_driver
from kvarena.allocators.vmm.tensor import strided_tensor
from kvarena.experiments.gpu_validation.record import Values
from kvarena.experiments.gpu_validation.step import Context
from kvarena.experiments.gpu_validation.steps.kernels import (
    FILLER,
    PAGE_GROUP,
    SHAPES,
    check,
    kernel_names,
    kernel_to_run,
)
from kvarena.kernels.catalogue import CATALOGUE
from kvarena.kernels.layout import Layout
from kvarena.kernels.random_batch import Batch
from kvarena.kernels.view import BatchView, LayerCache

GROUPS = (3, 1, 2)  # page-groups of each row that its sequence fills
QUERIES = (40, 7, 1)  # of a prefill
ROW_GROUPS = 4
EDGES = {"mapped to its length": 0, "one page-group more": 1}


def cases(device: str) -> list[str]:
    """Every kernel that reads rows, at both edges."""
    names = [name for name in kernel_names(device) if Layout.CONTIGUOUS in CATALOGUE[name][0].layouts]
    return [f"{name}, {edge}" for name in names for edge in EDGES]


def uses(case: str) -> list[str]:
    """The kernel."""
    return [CATALOGUE[case.partition(", ")[0]][1]]


def run(case: str, context: Context) -> Values:
    """Decode and prefill at the edge; a fault ends the process, or raises."""
    name, edge = case.split(", ")
    kernel = kernel_to_run(name, context)
    with closing(make_driver(context.device, PAGE_GROUP[context.device])) as driver:
        gaps = {}
        for phase in ("decode", "prefill"):
            batch = at_the_edge(driver, context, EDGES[edge], phase == "prefill")
            gaps[f"gap, {phase}"] = check(kernel, batch)
        return gaps


def at_the_edge(driver: Driver, context: Context, more: int, prefill: bool) -> Batch:
    """Rows whose mapped memory ends `more` page-groups past the end of their sequences."""
    shapes, group = SHAPES[context.device][0], driver.page_group_bytes
    token_bytes = shapes.heads * shapes.size * shapes.dtype.itemsize
    group_tokens = group // token_bytes
    lengths = [count * group_tokens for count in GROUPS]
    k, v = (_rows(driver, shapes.heads, shapes.size, shapes.dtype, token_bytes, more) for _ in range(2))
    for row, length in enumerate(lengths):
        for x in (k, v):
            x[row, : length + more * group_tokens] = FILLER  # new memory may hold NaNs
            x[row, :length] = torch.randn(length, *x.shape[2:]).to(x)
    counts = list(QUERIES) if prefill else [1] * len(lengths)
    q = torch.randn(sum(counts), shapes.heads * shapes.group, shapes.size).to(k)
    view = make_view(lengths, counts, rows=list(range(len(lengths))))
    if context.on_gpu:
        assert view.rows is not None
        starts = torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device="cuda")
        view = BatchView(view.lengths.to("cuda"), starts, view.rows.to("cuda"), None, view.max_length, view.max_queries)
    return Batch(q, LayerCache(Layout.CONTIGUOUS, k, v), view)


def _rows(driver: Driver, heads: int, size: int, dtype: torch.dtype, token_bytes: int, more: int) -> Tensor:
    """[rows, tokens, H, D] over addresses of which the first page-groups of each row are mapped."""
    group = driver.page_group_bytes
    row_bytes = ROW_GROUPS * group
    base = driver.reserve(len(GROUPS) * row_bytes)
    for row, count in enumerate(GROUPS):
        driver.map(base, row * row_bytes, driver.create(count + more))
    strides = (row_bytes, token_bytes, size * dtype.itemsize, dtype.itemsize)
    return strided_tensor(driver, base, dtype, (len(GROUPS), row_bytes // token_bytes, heads, size), strides)
