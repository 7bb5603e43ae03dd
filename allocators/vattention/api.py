"""vAttention as its paper offers it to a serving framework: Table 4, on top of our policy and store.

Algorithm 1, with `va` for the library:

    for new requests:      idx = va.alloc_reqid(); length[idx] = prompt
    if va.step(length):    preempt (free_reqid, length 0) and step again
    forward()              K and V of request idx are row idx of the tensors that `init` returned
    for each request:      finished: length[idx] = 0; va.free_reqid(idx)      else: length[idx] += 1
"""

from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor

from kvarena.allocators.kv_layout import attention_layout
from kvarena.allocators.memory.model_shape import ModelShape
from kvarena.allocators.policy import Admission, Sequence
from kvarena.allocators.vattention.policy import VAttentionConfig, VAttentionPolicy
from kvarena.allocators.vattention.store import VirtualStore
from kvarena.errors import UserError

_DTYPES = {2: torch.float16, 4: torch.float32}


class VAttention:
    """Request ids, and memory for the lengths that the framework tells."""

    def __init__(self, pool_bytes: int, **switches: Any) -> None:
        """`pool_bytes` of physical memory; `switches` are options of VAttentionConfig, such as overlap."""
        self._pool_bytes = pool_bytes
        self._switches = switches

    def init(self, N: int, B: int, L: int, H: int, D: int, P: int, page_group_size: int | str) -> list[Tensor]:
        """Create the pool and return the KV tensors: K of each layer, then V of each, [B, L, H, D].

        N layers, B requests at most, of L tokens at most, H KV heads of size D, P bytes per element. With
        `tensor_slicing` there are two tensors, [B, L, N, H, D]. Raises UserError for sizes that do not fit.
        """
        if P not in _DTYPES:
            raise UserError(f"P={P} bytes per element: there are {', '.join(map(str, _DTYPES))}")
        dtype = _DTYPES[P]
        self._policy = VAttentionPolicy(
            VAttentionConfig(max_rows=B, page_group=str(page_group_size), watermark=0.0, **self._switches),
            attention_layout(N, H, D, str(dtype).removeprefix("torch.")),
            self._pool_bytes,
            max_tokens=L,
        )
        self.store = VirtualStore(self._policy, ModelShape(N, H, D, dtype))
        self._seq_ids: dict[int, int] = {}  # by request id
        self._next_seq_id = 0
        return self.store.tensors

    def alloc_reqid(self) -> int:
        """A request id, which is a row of the tensors. Raises ValueError when all B are in use."""
        seq = Sequence(self._next_seq_id, prompt_tokens=0, output_tokens=0)
        if self._policy.admit(Admission([seq], tokens=0)) is None:
            raise ValueError(f"all {self._policy.max_rows} request ids are in use")
        self._next_seq_id += 1
        reqid = self._policy.row(seq.seq_id)
        self._seq_ids[reqid] = seq.seq_id
        return reqid

    def free_reqid(self, reqid: int) -> None:
        """Give a request id back."""
        self._policy.release(self._seq_ids.pop(reqid))

    def step(self, seq_lens: Seq[int]) -> int:
        """Back the first `seq_lens[reqid]` positions of every request: 0, or -1 where memory is short.

        What could be backed stays so; after a preemption the same call goes on from there. Raises ValueError for a
        length of a request id that is not allocated.
        """
        short = False
        for reqid, length in enumerate(seq_lens):
            if length and reqid not in self._seq_ids:
                raise ValueError(f"seq_lens[{reqid}] = {length}, but request id {reqid} is not allocated")
            if length:
                seq_id = self._seq_ids[reqid]
                missing = length - self._policy.length(seq_id)
                short = short or (missing > 0 and not self._policy.grow(seq_id, missing))
        self.store.apply(self._policy.drain())
        if short:
            return -1
        self.store.apply_in_background(self._policy.look_ahead())
        return 0

    def close(self) -> None:
        """Give everything back; the tensors must not be touched afterwards."""
        self.store.close()
