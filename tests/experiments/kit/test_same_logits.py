"""Systems that compute something else are not timed."""

import pytest
import torch

from kvarena.experiments.kit.same_logits import check_same_logits

LOGITS = torch.tensor([[1.0, -2.0], [0.5, 1.5]])


def test_what_another_order_of_sums_makes_of_the_last_bits_passes() -> None:
    check_same_logits({"a": LOGITS, "b": LOGITS * (1 + 2e-5)}, "float32", "a step")


@pytest.mark.parametrize("other", [LOGITS + 3e-4, LOGITS.flip(0), LOGITS * torch.nan])
def test_other_logits_are_refused_by_name(other: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match="c computes other logits of a step than a"):
        check_same_logits({"a": LOGITS, "b": LOGITS.clone(), "c": other}, "float32", "a step")
