"""The `fa3` kernel: FlashAttention 3, out of vLLM's wheel, on contiguous rows and on blocks.

One entry point reads both: `seqused_k` with `kv_batch_idx` picks rows, `page_table` blocks. But it is not one body.
A row is fetched by the tensor memory accelerator (TMA), whole tiles at a time; blocks are fetched by `cp.async`,
except by a prefill of more than one tile of query rows over blocks that are a multiple of a tile. So a comparison of
the two is a "same library" pair.

TMA fetches a tile to its end, past the length of a sequence that is not the longest: up to 191 tokens (176 for a
head size of 128). Two things follow. Where a vAttention row has no memory there, the access may fault. And what lies
there must be finite: it is weighed with 0, and 0 x NaN is NaN; so fresh memory has to be cleared once.
"""

import math

import torch
from torch import Tensor

from kvarena.errors import UserError
from kvarena.kernels.kernel import AttentionKernel
from kvarena.kernels.layout import Layout
from kvarena.kernels.libraries.vllm_library import load_operators
from kvarena.kernels.spec import CUDA, HALF, KernelSpec
from kvarena.kernels.view import BatchView, LayerCache

LIBRARY = "vllm_flash_attn/_vllm_fa3_C.abi3.so"


class FA3Attention(AttentionKernel):
    """Both layouts, on Hopper GPUs; `num_splits` 0 leaves the number of splits to the library."""

    spec = KernelSpec(
        name="fa3",
        body="FlashAttention 3",
        library="FlashAttention 3 of vllm",
        layouts=frozenset(Layout),
        devices=CUDA,
        dtypes=HALF,
        head_sizes=frozenset(range(8, 257, 8)),
        requires=("vllm",),
        install_hint="pip install -e '.[flash-attn]', or name the library's file in KVARENA_FA3_SO",
        reads_past=191,  # to the end of a tile; read from the library's sources, to be seen on a GPU
        library_variable="KVARENA_FA3_SO",
        in_graph=True,
    )

    def __init__(self, num_splits: int = 0) -> None:
        """Raises UserError where the library is missing, or the GPU is none of Hopper's."""
        operators = load_operators(self.spec, "_vllm_fa3_C", LIBRARY)
        major, minor = torch.cuda.get_device_capability()
        if major != 9:
            raise UserError(
                f"kernel=fa3: compiled for Hopper (9.0) only; this GPU has compute capability {major}.{minor}"
            )
        self._forward = operators.fwd
        self.num_splits = num_splits

    def decode(self, q: Tensor, cache: LayerCache, view: BatchView, out: Tensor) -> None:
        """Attend with one query per sequence."""
        self._attend(q, cache, view, out)

    def prefill(self, q: Tensor, cache: LayerCache, view: BatchView, out: Tensor) -> None:
        """Attend causally with packed queries."""
        self._attend(q, cache, view, out)

    def _attend(self, q: Tensor, cache: LayerCache, view: BatchView, out: Tensor) -> None:
        # The library takes capacities, not lengths, for what it could have to read; hence the slices.
        k, v, page_table, rows = cache.k, cache.v, None, None
        if view.block_table is not None:
            page_table = view.block_table[:, : -(-view.max_length // cache.block_size)]
        else:
            assert view.rows is not None, "a view has rows or a block table"
            rows = view.rows.to(torch.int32)
            k, v = k[:, : view.max_length], v[:, : view.max_length]
        self._forward(
            q=q,
            k=k,
            v=v,
            k_new=None,
            v_new=None,
            q_v=None,
            out=out,
            cu_seqlens_q=view.query_starts,
            cu_seqlens_k=None,
            cu_seqlens_k_new=None,
            seqused_q=None,
            seqused_k=view.lengths,
            max_seqlen_q=view.max_queries,
            max_seqlen_k=view.max_length,
            page_table=page_table,
            kv_batch_idx=rows,
            leftpad_k=None,
            rotary_cos=None,
            rotary_sin=None,
            seqlens_rotary=None,
            q_descale=None,
            k_descale=None,
            v_descale=None,
            softmax_scale=1 / math.sqrt(cache.head_size),
            is_causal=True,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            is_rotary_interleaved=False,
            scheduler_metadata=None,
            num_splits=self.num_splits,
            pack_gqa=None,
            sm_margin=0,
            s_aux=None,
            cp_world_size=1,
            cp_rank=0,
            cp_tot_seqused_k=None,
        )
