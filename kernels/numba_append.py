"""Writing the K/V of new tokens on a CPU, in either layout. No GPU loads numba for it."""

from torch import Tensor

from kvarena.kernels.addressing import addressing, flat
from kvarena.kernels.jit import Array, jit
from kvarena.kernels.view import BatchView, LayerCache


def append_numba(k_new: Tensor, v_new: Tensor, cache: LayerCache, view: BatchView) -> None:
    """Write the last tokens of each sequence: k_new, v_new are [T, H, D], packed as the queries are."""
    where = addressing(cache, view)
    lengths, starts = view.lengths.numpy(), view.query_starts.numpy()
    for new, old in ((k_new, cache.k), (v_new, cache.v)):
        tokens = flat(new.contiguous()).reshape(len(new), -1)
        _write(tokens, flat(old), where.table, where.block_size, old.stride(0), old.stride(1), lengths, starts)


@jit
def _write(
    tokens: Array,
    cache: Array,
    table: Array,
    block_size: int,
    block_stride: int,
    token_stride: int,
    lengths: Array,
    starts: Array,
) -> None:
    width = tokens.shape[1]
    for sequence in range(lengths.size):
        past = lengths[sequence] - starts[sequence + 1]  # token i of the packed batch has position past + i
        for i in range(starts[sequence], starts[sequence + 1]):
            block, slot = divmod(past + i, block_size)
            at = table[sequence, block] * block_stride + slot * token_stride
            for j in range(width):
                cache[at + j] = tokens[i, j]
