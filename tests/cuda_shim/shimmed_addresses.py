"""What the validation on a GPU asks of addresses, asked of the shim: its questions run as they will there.

Run by `test_cuda_shim.py`.
"""

import pytest
import torch
from torch_on_shim import SHIM

from kvarena.experiments.gpu_validation.step import Context
from kvarena.experiments.gpu_validation.steps import addresses
from kvarena.kernels.random_batch import Shapes

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("unwatched")]  # chosen with the others

IN_TIME = "mapping beside running kernels"  # of large products, which take the host a minute


@pytest.mark.parametrize("question", [case for case in addresses.cases("cuda") if case != IN_TIME])
def test_the_shim_has_an_answer(question, tmp_path, monkeypatch):
    tokens_of_128_kb = Shapes(heads=128, group=1, size=256, device="cuda")  # 16 in a row: it is interpreted
    monkeypatch.setitem(addresses.SHAPES, "cuda", (tokens_of_128_kb,))
    before = SHIM.live()
    answer = addresses.run(question, Context("cuda", tmp_path, tmp_path))
    assert SHIM.live()[:4] == before[:4]
    if question == "what new memory holds":
        assert answer == {"zero": False, "finite as bfloat16": False}
    if question == "running out of memory":
        assert "CUDA_ERROR_OUT_OF_MEMORY" in answer["refused with"]


def test_torch_takes_our_word_for_an_address_of_a_numbered_gpu():
    """A storage of `cuda`, without a number, is of another device than a tensor of `cuda:0`."""
    with pytest.raises(AssertionError):
        torch._C._construct_storage_from_data_pointer(64, torch.device("cuda"), 64)
