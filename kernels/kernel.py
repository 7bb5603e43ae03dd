"""The contract of an attention kernel: what it computes. What it can read is data (`spec.py`)."""

from abc import ABC, abstractmethod

from torch import Tensor

from kvarena.kernels.spec import KernelSpec
from kvarena.kernels.view import BatchView, LayerCache

__all__ = ["AttentionKernel", "KernelSpec"]


class AttentionKernel(ABC):
    """Attention over a KV cache. Instances hold no state of a request and may be shared by systems."""

    spec: KernelSpec

    @abstractmethod
    def decode(self, q: Tensor, cache: LayerCache, view: BatchView, out: Tensor) -> None:
        """Attend with one query per sequence: q, out are [B, Hq, D]; Hq is a multiple of the KV heads.

        The softmax scale is 1 / sqrt(D). Writes every element of `out`, reads no position at or past
        `view.lengths`.
        """

    @abstractmethod
    def prefill(self, q: Tensor, cache: LayerCache, view: BatchView, out: Tensor) -> None:
        """Attend causally with several queries per sequence, packed: q, out are [T, Hq, D]."""
