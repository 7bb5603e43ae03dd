"""Writing the K/V of new tokens on a GPU, in either layout, in one launch that waits for nothing.

`append_torch` must learn the number of queries on the host, which stalls the GPU and cannot be captured in a graph.
"""

# mypy: disable-error-code="untyped-decorator"

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from kvarena.kernels.triton_body import locate, pointer_to
from kvarena.kernels.triton_launch import alignment
from kvarena.kernels.view import BatchView, LayerCache


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["lengths", "query_starts", "table"])
def write_tokens(
    k_new: tl.tensor,  # [T, ELEMENTS]
    v_new: tl.tensor,
    k_address: tl.tensor,  # int64: see `pointer_to`
    v_address: tl.tensor,
    lengths: tl.tensor,
    query_starts: tl.tensor,
    table: tl.tensor,
    table_stride: tl.tensor,
    k_block_stride: tl.tensor,
    k_token_stride: tl.tensor,
    v_block_stride: tl.tensor,
    v_token_stride: tl.tensor,
    k_new_stride: tl.tensor,
    v_new_stride: tl.tensor,
    ELEMENTS: tl.constexpr,  # H * D
    WIDTH: tl.constexpr,  # the next power of two
    BLOCK_SIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    """Write one token's K and V: program (i, b) takes token i of those that sequence b brings."""
    k, v = pointer_to(k_address, k_new, ALIGNED), pointer_to(v_address, v_new, ALIGNED)
    i, sequence = tl.program_id(0), tl.program_id(1)
    start = tl.load(query_starts + sequence)
    queries = tl.load(query_starts + sequence + 1) - start
    if i >= queries:
        return
    length = tl.load(lengths + sequence)
    position = length - queries + i
    entries = table + sequence.to(tl.int64) * table_stride
    block, slot = locate(entries, position, length, BLOCK_SIZE, False)
    k_at, v_at = block * k_block_stride + slot * k_token_stride, block * v_block_stride + slot * v_token_stride
    element = tl.arange(0, WIDTH)
    token = (start + i).to(tl.int64)
    inside = element < ELEMENTS
    tl.store(k + k_at + element, tl.load(k_new + token * k_new_stride + element, mask=inside), mask=inside)
    tl.store(v + v_at + element, tl.load(v_new + token * v_new_stride + element, mask=inside), mask=inside)


def append_triton(k_new: Tensor, v_new: Tensor, cache: LayerCache, view: BatchView) -> None:
    """Write the last tokens of each sequence: k_new, v_new are [T, H, D], packed as the queries are."""
    k_new, v_new = (x if x[0].is_contiguous() else x.contiguous() for x in (k_new.to(cache.k), v_new.to(cache.v)))
    table = view.block_table if view.block_table is not None else view.rows
    assert table is not None, "a view has rows or a block table"
    elements = cache.num_kv_heads * cache.head_size
    width = triton.next_power_of_2(elements)
    write_tokens[view.max_queries, view.batch_size](
        k_new,
        v_new,
        cache.k.data_ptr(),
        cache.v.data_ptr(),
        view.lengths,
        view.query_starts,
        table,
        table.stride(0),
        *cache.k.stride()[:2],
        *cache.v.stride()[:2],
        k_new.stride(0),
        v_new.stride(0),
        ELEMENTS=elements,
        WIDTH=width,
        BLOCK_SIZE=0 if view.block_table is None else cache.block_size,
        ALIGNED=alignment(cache),
        num_warps=max(1, min(8, width // 256)),  # 16 bytes a thread at least
    )
