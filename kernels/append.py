"""Writing the K/V of new tokens into the cache, in either layout. Callers time it apart from attention."""

from importlib.util import find_spec

import torch
from torch import Tensor

from kvarena.kernels.view import BatchView, LayerCache, positions

_NUMBA_DTYPES = (torch.float32, torch.bfloat16)


def append(k_new: Tensor, v_new: Tensor, cache: LayerCache, view: BatchView) -> None:
    """Write the last tokens of each sequence: k_new, v_new are [T, H, D], packed as the queries are."""
    if cache.k.device.type == "cpu" and cache.k.dtype in _NUMBA_DTYPES:
        from kvarena.kernels.numba_append import append_numba

        append_numba(k_new, v_new, cache, view)
    elif cache.k.device.type == "cuda" and find_spec("triton"):
        from kvarena.kernels.triton_append import append_triton

        append_triton(k_new, v_new, cache, view)
    else:
        append_torch(k_new, v_new, cache, view)


def append_torch(k_new: Tensor, v_new: Tensor, cache: LayerCache, view: BatchView) -> None:
    """Do the same on any device with one indexed write per tensor."""
    position = positions(view)  # [T]
    counts = (view.query_starts[1:] - view.query_starts[:-1]).to(torch.int64)
    if view.block_table is not None:
        sequence = torch.repeat_interleave(torch.arange(view.batch_size, device=position.device), counts)
        block = view.block_table[sequence, position // cache.block_size].to(torch.int64)
        slot = position % cache.block_size
    else:
        assert view.rows is not None, "a view has rows or a block table"
        block, slot = torch.repeat_interleave(view.rows.to(torch.int64), counts), position
    cache.k[block, slot] = k_new
    cache.v[block, slot] = v_new
