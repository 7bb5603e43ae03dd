"""Many copies on a GPU as one launch, of a kernel that is given addresses.

The addresses may be a paged pool's or a virtual tensor's. Sizes and offsets are multiples of the word.
"""

# mypy: disable-error-code="untyped-decorator"

from collections.abc import Sequence

import numpy as np
import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from kvarena.allocators.memory.byte_copies import Ints, Runs, independent_runs
from kvarena.allocators.memory.staging import staging_buffer

WORD_BYTES = 4  # the smallest K/V of a token is a multiple of it
PIECE_BYTES = 16 * 1024  # that a program copies: 16 bytes a thread, eight at a time


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["runs", "bases"])
def copy_pieces(
    runs: tl.tensor,  # [3, N] int64: sources, targets, sizes; offsets in bytes
    bases: tl.tensor,  # [T] int64: addresses
    count: tl.tensor,  # N
    PIECE: tl.constexpr,  # words
    ALIGNED: tl.constexpr,  # bytes that divide every address and size
) -> None:
    """Copy one piece of one run in one tensor: program (piece, run, tensor)."""
    piece, run = tl.program_id(0), tl.program_id(1)
    base = tl.load(bases + tl.program_id(2))
    words = tl.multiple_of(tl.load(runs + 2 * count + run) // 4, ALIGNED // 4)
    first = piece * PIECE
    if first >= words:
        return
    source = tl.multiple_of((base + tl.load(runs + run)).to(tl.pointer_type(tl.int32)), ALIGNED)
    target = tl.multiple_of((base + tl.load(runs + count + run)).to(tl.pointer_type(tl.int32)), ALIGNED)
    word = first + tl.arange(0, PIECE)
    inside = word < words
    tl.store(target + word, tl.load(source + word, mask=inside), mask=inside)


class TritonCopies:
    """Copies in tensors of one GPU that begin at `bases`."""

    def __init__(self, bases: Sequence[int], device: torch.device) -> None:
        self._device = device
        self._bases = torch.tensor(bases, dtype=torch.int64, device=device)
        self._aligned = WORD_BYTES if any(base % 16 for base in bases) else 16

    def __call__(self, runs: Runs) -> None:
        """Copy runs, in one launch unless one reads what another has written. The host does not wait."""
        for part in independent_runs(runs):
            self._launch(np.stack(part))

    def _launch(self, runs: Ints) -> None:
        """Copy runs [3, N] - sources, targets, sizes - that do not touch each other."""
        count, longest = runs.shape[1], int(runs[2].max())
        aligned = WORD_BYTES if (runs % 16).any() else self._aligned
        copy_pieces[-(-longest // PIECE_BYTES), count, len(self._bases)](
            self._send(runs), self._bases, count, PIECE=PIECE_BYTES // WORD_BYTES, ALIGNED=aligned, num_warps=8
        )

    def _send(self, runs: Ints) -> Tensor:
        """[3, N] on the device, through pinned memory."""
        buffer, words = staging_buffer(2 * runs.size, self._device)
        words.view(np.int64)[:] = runs.ravel()
        return buffer.to(self._device, non_blocking=True).view(torch.int64)
