"""The `vllm_paged` kernel: PagedAttention's own, `paged_attention_v1` and `v2` of vLLM up to 0.24.

It cannot read the blocks of any other library: within a block it wants keys split into groups of 16 bytes and
values transposed, [N, H, D / x, P, x] and [N, H, D, P] for our [N, P, H, D]. No strides express that. So `decode`
copies the blocks of its batch into that layout first, each time, and what it takes is not the kernel's time: a
benchmark of the kernel calls `converted` once and times `attend`.

It decodes only. vLLM computed prompts with another library, on keys that were not in blocks yet; here they go
through `gather_sdpa`.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kvarena.kernels.layout import Layout
from kvarena.kernels.libraries.vllm_library import load_operators
from kvarena.kernels.spec import ANY_DTYPE, CUDA, KernelSpec
from kvarena.kernels.torch.gather_sdpa import GatherSDPAAttention
from kvarena.kernels.view import BatchView, LayerCache

LIBRARY = "_C.abi3.so"
PARTITION_TOKENS = 512  # of v2, which splits a sequence into partitions; compiled in
VECTOR_BYTES = 16


class VLLMBlocks(NamedTuple):
    """Blocks in vLLM's layout, and where the sequences of a batch lie in them."""

    keys: Tensor  # [n, H, D / x, P, x]
    values: Tensor  # [n, H, D, P]
    table: Tensor  # [B, blocks] int32


def converted(cache: LayerCache, view: BatchView) -> VLLMBlocks:
    """Copy the blocks of a batch into vLLM's layout, in their order in the cache."""
    assert view.block_table is not None, "vllm_paged reads the paged layout"
    _, size, heads, head_size = cache.k.shape
    blocks = -(-view.lengths // size)
    used = torch.arange(-(-view.max_length // size), device=blocks.device) < blocks[:, None]
    table = view.block_table[:, : used.shape[1]]
    chosen, place = torch.unique(table[used], return_inverse=True)
    renumbered = torch.zeros_like(table)
    renumbered[used] = place.to(torch.int32)
    x = VECTOR_BYTES // cache.k.element_size()
    keys = cache.k[chosen].view(len(chosen), size, heads, head_size // x, x).permute(0, 2, 3, 1, 4).contiguous()
    return VLLMBlocks(keys, cache.v[chosen].permute(0, 2, 3, 1).contiguous(), renumbered)


class VLLMPagedAttention(GatherSDPAAttention):
    """Paged; decode by vLLM's kernel over a copy of the blocks, prefill as `gather_sdpa`."""

    spec = KernelSpec(
        name="vllm_paged",
        body="vllm paged_attention, over a copy in its own layout",
        library="vllm",
        layouts=frozenset({Layout.PAGED}),
        devices=CUDA,
        dtypes=ANY_DTYPE,
        head_sizes=frozenset({32, 64, 80, 96, 112, 120, 128, 192, 256}),
        block_sizes=frozenset({8, 16, 32}),
        requires=("vllm",),
        install_hint="pip install 'vllm<0.25' (0.25 dropped it), or name its _C library in KVARENA_VLLM_SO",
        library_variable="KVARENA_VLLM_SO",
    )

    def __init__(self) -> None:
        self._operators = load_operators(self.spec, "_C", LIBRARY)

    def decode(self, q: Tensor, cache: LayerCache, view: BatchView, out: Tensor) -> None:
        """Convert the batch's blocks, then attend with one query per sequence."""
        self.attend(q, converted(cache, view), view, out)

    def attend(self, q: Tensor, blocks: VLLMBlocks, view: BatchView, out: Tensor) -> None:
        """Attend over converted blocks. Like vLLM, choose v2 where v1's work would be too coarse."""
        sequences, query_heads, size = q.shape
        partitions = -(-view.max_length // PARTITION_TOKENS)
        entry, scratch = self._operators.paged_attention_v1, {}
        if partitions > 1 and (sequences * query_heads <= 512 or view.max_length > 8192):
            entry = self._operators.paged_attention_v2
            partial = (sequences, query_heads, partitions)
            scratch = {
                "exp_sums": torch.empty(partial, dtype=torch.float32, device=q.device),
                "max_logits": torch.empty(partial, dtype=torch.float32, device=q.device),
                "tmp_out": torch.empty((*partial, size), dtype=q.dtype, device=q.device),
            }
        one = torch.ones(1, dtype=torch.float32, device=q.device)
        entry(
            out=out,
            **scratch,
            query=q,
            key_cache=blocks.keys,
            value_cache=blocks.values,
            num_kv_heads=blocks.values.shape[1],
            scale=1 / math.sqrt(size),
            block_tables=blocks.table,
            seq_lens=view.lengths,
            block_size=blocks.values.shape[3],
            max_seq_len=view.max_length,
            alibi_slopes=None,
            kv_cache_dtype="auto",
            k_scale=one,
            v_scale=one,
            tp_rank=0,
            blocksparse_local_blocks=0,
            blocksparse_vert_stride=1,
            blocksparse_block_size=64,
            blocksparse_head_sliding_step=0,
        )
