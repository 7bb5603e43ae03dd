"""The `gather_sdpa` kernel: what one does without a paged kernel. Blocks are copied together, then SDPA runs."""

from torch import Tensor

from kvarena.kernels.kernel import AttentionKernel
from kvarena.kernels.layout import Layout
from kvarena.kernels.spec import ANY_DEVICE, ANY_DTYPE, KernelSpec
from kvarena.kernels.torch.sdpa import decode_sequence, prefill_sequence
from kvarena.kernels.view import BatchView, LayerCache


def gather(blocks: Tensor, table: Tensor, length: int) -> Tensor:
    """Copy the first `length` tokens of a sequence together: [N, P, H, D] -> [length, H, D]."""
    used = table[: -(-length // blocks.shape[1])]
    return blocks.index_select(0, used).flatten(0, 1)[:length]


class GatherSDPAAttention(AttentionKernel):
    """Paged; one copy of every sequence's K/V in each call."""

    spec = KernelSpec(
        name="gather_sdpa",
        body="gather, then torch sdpa",
        library="torch",
        layouts=frozenset({Layout.PAGED}),
        devices=ANY_DEVICE,
        dtypes=ANY_DTYPE,
    )

    def decode(self, q: Tensor, cache: LayerCache, view: BatchView, out: Tensor) -> None:
        """Attend with one query per sequence."""
        assert view.block_table is not None, "gather_sdpa reads the paged layout"
        for b, length in enumerate(view.lengths.tolist()):
            k, v = (gather(x, view.block_table[b], length) for x in (cache.k, cache.v))
            decode_sequence(q[b], k, v, out[b])

    def prefill(self, q: Tensor, cache: LayerCache, view: BatchView, out: Tensor) -> None:
        """Attend causally with packed queries."""
        assert view.block_table is not None, "gather_sdpa reads the paged layout"
        starts = view.query_starts.tolist()
        for b, length in enumerate(view.lengths.tolist()):
            k, v = (gather(x, view.block_table[b], length) for x in (cache.k, cache.v))
            run = slice(starts[b], starts[b + 1])
            prefill_sequence(q[run], k, v, out[run])
