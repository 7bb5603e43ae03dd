"""The contract of an attention kernel: what it can read, and what it computes."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from kvarena.kernels.layout import Layout
from kvarena.kernels.view import BatchView, LayerCache


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """What a kernel can read. `None` means "any"."""

    name: str  # the name of conf/kernel/<name>.yaml
    body: str  # code that computes the attention: two layouts of one body differ in addressing alone
    library: str  # distribution the code comes from: two kernels of one library are a "same library" pair
    layouts: frozenset[Layout]
    devices: frozenset[str]  # of {"cpu", "cuda"}
    dtypes: frozenset[str]  # of {"float32", "bfloat16", "float16"}
    head_sizes: frozenset[int] | None = None
    block_sizes: frozenset[int] | None = None  # paged only
    requires: tuple[str, ...] = ()  # importable modules it needs, beside torch
    install_hint: str = ""  # what to type where they are absent


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
