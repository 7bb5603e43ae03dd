"""The GPU tier's suite: what every kernel that runs here takes for one decode call, and K/V for being appended.

`worker.py` runs it, as it does the timed suite. A benchmark's body comes back when the device has finished.
"""

from collections.abc import Callable
from functools import partial

import torch

from kvarena.kernels.append import append_torch
from kvarena.kernels.catalogue import CATALOGUE
from kvarena.kernels.layout import Layout
from kvarena.kernels.registry import fits, get_kernel, missing
from kvarena.kernels.spec import KernelSpec
from kvarena.kernels.view import BatchView, LayerCache

Body = Callable[[], object]

BATCH, TOKENS, KV_HEADS, HEADS, SIZE = 16, 4096, 4, 32, 128
CALLS = 20  # per run: they share one wait for the device


def decode(kernel_name: str, layout: Layout, block_size: int, device: str = "cuda") -> Body:
    """Decode calls over 16 sequences of 4096 tokens, float16."""
    kernel, cache, view = get_kernel(kernel_name), _cache(layout, block_size, device), _view(layout, block_size, device)
    q = torch.ones(BATCH, HEADS, SIZE, dtype=torch.float16, device=device)
    out = torch.empty_like(q)
    return _finished(lambda: kernel.decode(q, cache, view, out), device)


def append_kv(layout: Layout, block_size: int = 16, device: str = "cuda") -> Body:
    """K and V of one decode step written into one layer."""
    cache, view = _cache(layout, block_size, device), _view(layout, block_size, device)
    k = torch.ones(BATCH, KV_HEADS, SIZE, dtype=torch.float16, device=device)
    return _finished(lambda: append_torch(k, k, cache, view), device)


def _finished(call: Callable[[], object], device: str) -> Body:
    def body() -> None:
        for _ in range(CALLS):
            call()
        if device == "cuda":
            torch.cuda.synchronize()

    return body


def _cache(layout: Layout, block_size: int, device: str) -> LayerCache:
    rows, tokens = (BATCH, TOKENS) if layout is Layout.CONTIGUOUS else (BATCH * TOKENS // block_size, block_size)
    k, v = torch.ones(2, rows, tokens, KV_HEADS, SIZE, dtype=torch.float16, device=device)
    return LayerCache(layout, k, v)


def _view(layout: Layout, block_size: int, device: str) -> BatchView:
    """All sequences equally long; blocks in a random order, the same every time."""
    order = torch.randperm(BATCH * TOKENS // block_size, generator=torch.Generator().manual_seed(0))
    return BatchView(
        lengths=torch.full((BATCH,), TOKENS, dtype=torch.int32, device=device),
        query_starts=torch.arange(BATCH + 1, dtype=torch.int32, device=device),
        rows=torch.arange(BATCH, device=device) if layout is Layout.CONTIGUOUS else None,
        block_table=order.view(BATCH, -1).int().to(device) if layout is Layout.PAGED else None,
        max_length=TOKENS,
        max_queries=1,
    )


def _decodes() -> dict[str, Callable[[], Body]]:
    """Every pair of kernel and layout that this environment can run."""
    found: dict[str, Callable[[], Body]] = {}
    for name, (spec, _, _) in CATALOGUE.items():
        block_size = _block_size(spec)
        for layout in Layout:
            if missing(spec) is None and fits(spec, layout, "cuda", "float16", SIZE, block_size) is None:
                found[f"decode attention, {name}, {layout}"] = partial(decode, name, layout, block_size)
    return found


def _block_size(spec: KernelSpec) -> int:
    """16, vLLM's, or the smallest that the kernel reads."""
    return 16 if spec.block_sizes is None or 16 in spec.block_sizes else min(spec.block_sizes)


BENCHMARKS: dict[str, Callable[[], Body]] = {
    **_decodes(),
    **{f"append K/V, {layout}": partial(append_kv, layout) for layout in Layout},
}
