"""Correctness before time: systems that are timed side by side must compute the same."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a modelled run needs no torch
    from torch import Tensor

# Kernels sum in different orders: their logits differ by this part of the largest one, at most.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


def check_same_logits(logits: "Mapping[str, Tensor]", dtype: str, what: str) -> None:
    """Compare each system's logits [B, V] with the first one's. Raises RuntimeError where they differ by too much."""
    first, *others = logits
    reference = logits[first].double()
    for name in others:
        gap = float((logits[name].double() - reference).abs().max() / reference.abs().max())
        if not gap <= TOLERANCE[dtype]:
            raise RuntimeError(f"{name} computes other logits of {what} than {first}: {gap:.2e} of the largest")
