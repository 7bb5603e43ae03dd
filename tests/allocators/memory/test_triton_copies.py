"""The kernel that copies on a GPU: interpreted, and compiled for GPUs that are not here."""

from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

copies = pytest.importorskip("kvarena.allocators.memory.triton_copies")


def test_the_interpreted_kernel_is_right(interpreted):
    interpreted(Path(__file__).with_name("interpreted_copies.py"))


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("aligned", "width"), [(16, "v4.b32"), (4, "b32")])
def test_it_moves_as_many_bytes_at_once_as_addresses_allow(capability, aligned, width):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = copies.copy_pieces.arg_names
    constants = {"PIECE": copies.PIECE_BYTES // 4, "ALIGNED": aligned}
    types = {"runs": "*i64", "bases": "*i64", "count": "i32"}
    source = ASTSource(
        fn=copies.copy_pieces,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs=constants,
    )
    ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8}).asm["ptx"]
    assert f"ld.global.{width}" in ptx
    assert f"st.global.{width}" in ptx
    assert ("v4.b32" in ptx) == (aligned == 16)


@pytest.mark.gpu
def test_on_a_gpu():
    """Blocks of two tensors, as the host copies them."""
    from kvarena.allocators.memory.byte_copies import ByteCopies, Runs

    device = torch.device("cuda")
    pool = torch.arange(2 * 64 * 4096, dtype=torch.int32).reshape(2, 64, 4096)
    on_gpu = pool.to(device)
    runs = Runs.of_blocks(list(range(0, 32)), list(range(32, 64)), pool[0, 0].nbytes)
    ByteCopies([tensor.data_ptr() for tensor in pool], torch.device("cpu"))(runs)
    copies.TritonCopies([tensor.data_ptr() for tensor in on_gpu], device)(runs)
    assert torch.equal(on_gpu.cpu(), pool)
