"""Our copying kernel in Triton's interpreter. Run by `test_triton_copies.py`, with TRITON_INTERPRET=1 set."""

import numpy as np
import pytest
import torch

from kvarena.allocators.memory.byte_copies import ByteCopies, Runs
from kvarena.allocators.memory.triton_copies import PIECE_BYTES, TritonCopies

# Triton 3.6's interpreter, with a numpy that still allows it.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar")

CPU = torch.device("cpu")


def pool() -> torch.Tensor:
    """Two tensors of 8 blocks of 64 KB."""
    return torch.arange(2 * 8 * 16_384, dtype=torch.int32).reshape(2, 8, 16_384)


@pytest.mark.parametrize(
    ("sources", "targets", "sizes"),
    [
        ([0, 65_536], [131_072, 262_144], [65_536, 65_536]),  # blocks
        ([4], [131_076], [PIECE_BYTES + 4]),  # no multiple of 16: a word more than a piece
        ([0, 16], [65_536, 131_072], [48, 3 * PIECE_BYTES]),  # of different sizes
        ([0, 65_536], [65_536, 131_072], [64, 64]),  # the second reads what the first has written
        ([0, 131_072], [65_536, 65_536], [64, 64]),  # the second writes over it
    ],
)
def test_as_the_host_copies(sources, targets, sizes):
    runs = Runs(*(np.array(values, dtype=np.int64) for values in (sources, targets, sizes)))
    ours, expected = pool(), pool()
    for copies, tensor in ((TritonCopies, ours), (ByteCopies, expected)):
        copies([tensor[0].data_ptr(), tensor[1].data_ptr()], CPU)(runs)
    assert torch.equal(ours, expected)
    assert not torch.equal(ours, pool())
