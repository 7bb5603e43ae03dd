"""The `fa2` kernel: FlashAttention 2, out of vLLM's wheel, whose block tables may have blocks of any 16 tokens."""

import math

from torch import Tensor

from kvarena.kernels.layout import Layout
from kvarena.kernels.libraries.flash_attention import FlashAttention2
from kvarena.kernels.libraries.vllm_library import load_operators
from kvarena.kernels.spec import CUDA, HALF, KernelSpec

LIBRARY = "vllm_flash_attn/_vllm_fa2_C.abi3.so"


class FA2Attention(FlashAttention2):
    """Both layouts, on GPUs of compute capability 8.0 and later."""

    spec = KernelSpec(
        name="fa2",
        body="FlashAttention 2",
        library="FlashAttention 2 of vllm",
        layouts=frozenset(Layout),
        devices=CUDA,
        dtypes=HALF,
        head_sizes=frozenset(range(8, 257, 8)),
        block_sizes=frozenset(range(16, 257, 16)),
        requires=("vllm",),
        install_hint="pip install -e '.[flash-attn]', or name the library's file in KVARENA_FA2_SO",
        library_variable="KVARENA_FA2_SO",
        in_graph=True,
    )

    def __init__(self, num_splits: int = 0) -> None:
        super().__init__(num_splits)
        self._forward = load_operators(self.spec, "_vllm_fa2_C", LIBRARY).fwd_kvcache

    def call(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Tensor,
        rows: Tensor | None,
        table: Tensor | None,
        out: Tensor,
    ) -> Tensor:
        """See FlashAttention2."""
        results: list[Tensor] = self._forward(
            q=q,
            kcache=k,
            vcache=v,
            k=None,
            v=None,
            seqlens_k=lengths,
            rotary_cos=None,
            rotary_sin=None,
            cache_batch_idx=rows,
            leftpad_k=None,
            block_table=table,
            alibi_slopes=None,
            out=out,
            softmax_scale=1 / math.sqrt(q.shape[-1]),
            is_causal=True,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            is_rotary_interleaved=False,
            num_splits=self.num_splits,
        )
        return results[0]
