"""The `flashinfer` kernel: FlashInfer's paged wrappers, for decode and prefill, on both layouts.

FlashInfer has no batched decode over contiguous rows with gaps, but a row can be read as pages that happen to lie in
order (`as_pages`). Pages matter for speed too: FlashInfer splits keys between pages only, so a row that cannot be
cut into pages is one page, and is never split.

Its `plan` reads lengths and block tables on the host, once a step: the layers of a step share it. Hence a step
cannot be captured in a CUDA graph here.
"""

import math
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvarena.errors import UserError
from kvarena.kernels.kernel import AttentionKernel
from kvarena.kernels.layout import Layout
from kvarena.kernels.spec import CUDA, HALF, KernelSpec
from kvarena.kernels.view import BatchView, LayerCache

WORKSPACE_BYTES = 256 * 2**20
LONGEST_PAGE = 256  # tokens of a page that a row is cut into
SHORTEST_PAGE = 16


class Pages(NamedTuple):
    """Tensors [pages, page size, H, D], and how many pages lie between the starts of two rows (rows only)."""

    k: Tensor
    v: Tensor
    per_row: int

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.k.shape[1]


def as_pages(cache: LayerCache) -> Pages:
    """Blocks as they are, rows cut into the longest pages of up to 256 tokens, or a row as one page.

    Raises UserError for strides that FlashInfer cannot take: it keeps them in 32 bits, and wants K's and V's alike.
    """
    if cache.k.stride() != cache.v.stride():
        raise UserError(
            f"kernel=flashinfer: K and V must have the same strides; {cache.k.stride()}, {cache.v.stride()}"
        )
    if cache.layout is Layout.PAGED:
        pages = Pages(cache.k, cache.v, per_row=0)
    else:
        page = _page_size(cache.k)
        pages = Pages(_cut(cache.k, page), _cut(cache.v, page), _pages_per_row(cache.k, page))
    if pages.k.stride(0) >= 2**32:
        raise UserError(f"kernel=flashinfer: keeps strides in 32 bits; a page's is {pages.k.stride(0)} elements")
    return pages


def _page_size(rows: Tensor) -> int:
    """Tokens of a page: it divides the row and the distance between rows."""
    tokens, rest = divmod(rows.stride(0), rows.stride(1))
    page = 0 if rest else math.gcd(tokens, rows.shape[1], LONGEST_PAGE)
    return page if page >= SHORTEST_PAGE else rows.shape[1]


def _pages_per_row(rows: Tensor, page: int) -> int:
    return 1 if page == rows.shape[1] else rows.stride(0) // (page * rows.stride(1))


def _cut(rows: Tensor, page: int) -> Tensor:
    """Show rows [R, S, H, D] as pages [N, page, H, D], without copying."""
    if page == rows.shape[1]:
        return rows
    pages = (rows.shape[0] - 1) * _pages_per_row(rows, page) + rows.shape[1] // page
    return rows.as_strided((pages, page, *rows.shape[2:]), (page * rows.stride(1), *rows.stride()[1:]))


class PageTable(NamedTuple):
    """FlashInfer's block table, on the host: sequence b has pages indices[indptr[b] : indptr[b + 1]]."""

    indptr: Tensor  # [B + 1] int32
    indices: Tensor  # [pages of all sequences] int32
    last_page_len: Tensor  # [B] int32: tokens in a sequence's last page, 1 to page size


def page_table(pages: Pages, view: BatchView) -> PageTable:
    """Name the pages of each sequence."""
    lengths = view.lengths.cpu()
    counts = (lengths + pages.page_size - 1) // pages.page_size
    ordinal = torch.arange(int(counts.max()), dtype=torch.int32)
    if view.block_table is not None:
        table = view.block_table[:, : len(ordinal)].cpu()
    else:
        assert view.rows is not None, "a view has rows or a block table"
        table = view.rows.cpu().to(torch.int64)[:, None] * pages.per_row + ordinal
    indptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    indices = table[ordinal < counts[:, None]].to(torch.int32)
    return PageTable(indptr, indices, lengths - (counts - 1) * pages.page_size)


class FlashInferAttention(AttentionKernel):
    """Both layouts. A decode uses tensor cores from 4 query heads per KV head on, unless told otherwise."""

    spec = KernelSpec(
        name="flashinfer",
        body="FlashInfer",
        library="flashinfer",
        layouts=frozenset(Layout),
        devices=CUDA,
        dtypes=HALF,
        head_sizes=frozenset({64, 128, 256}),
        requires=("flashinfer",),
        install_hint="pip install -e '.[gpu]'; it compiles its kernels when they first run, which takes nvcc",
    )

    def __init__(self, tensor_cores: bool | None = None) -> None:
        self._flashinfer = import_module("flashinfer")
        self._tensor_cores = tensor_cores
        self._wrappers: dict[tuple[torch.device, bool | None], Any] = {}
        self._planned: tuple[BatchView, tuple[Any, ...], Any] | None = None  # the last step's

    def decode(self, q: Tensor, cache: LayerCache, view: BatchView, out: Tensor) -> None:
        """Attend with one query per sequence."""
        self._attend(q, cache, view, out)

    def prefill(self, q: Tensor, cache: LayerCache, view: BatchView, out: Tensor) -> None:
        """Attend causally with packed queries."""
        self._attend(q, cache, view, out)

    def _attend(self, q: Tensor, cache: LayerCache, view: BatchView, out: Tensor) -> None:
        pages = as_pages(cache)
        heads = q.shape[1], cache.num_kv_heads, cache.head_size
        shape = *heads, pages.page_size, pages.per_row, q.dtype
        if self._planned is None or self._planned[0] is not view or self._planned[1] != shape:
            plan = self._plan_decode if view.is_decode else self._plan_prefill
            self._planned = view, shape, plan(page_table(pages, view), view, q, heads, pages.page_size)
        self._planned[2].run(q, (pages.k, pages.v), out=out)

    def _plan_decode(
        self, table: PageTable, view: BatchView, q: Tensor, heads: tuple[int, int, int], page_size: int
    ) -> Any:
        tensor_cores = heads[0] // heads[1] >= 4 if self._tensor_cores is None else self._tensor_cores
        wrapper = self._wrapper(q.device, tensor_cores)
        wrapper.plan(*table, *heads, page_size, q_data_type=q.dtype, kv_data_type=q.dtype)
        return wrapper

    def _plan_prefill(
        self, table: PageTable, view: BatchView, q: Tensor, heads: tuple[int, int, int], page_size: int
    ) -> Any:
        wrapper = self._wrapper(q.device, None)
        starts = view.query_starts.cpu()
        wrapper.plan(starts, *table, *heads, page_size, causal=True, q_data_type=q.dtype, kv_data_type=q.dtype)
        return wrapper

    def _wrapper(self, device: torch.device, tensor_cores: bool | None) -> Any:
        """The wrapper of a decode with or without tensor cores, or (None) of a prefill."""
        if (device, tensor_cores) not in self._wrappers:
            workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
            if tensor_cores is None:
                wrapper = self._flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
            else:
                wrapper = self._flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                    workspace, "NHD", use_tensor_cores=tensor_cores
                )
            self._wrappers[device, tensor_cores] = wrapper
        return self._wrappers[device, tensor_cores]
