"""The contract of a store: the bytes behind a policy.

A store owns one memfd (on a GPU: created handles), gives every layer its tensors, performs a policy's actions, and
counts physical bytes as the operating system or the driver does.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence as Seq
from typing import NamedTuple

from kvarena.allocators.policy import Action
from kvarena.kernels.view import BatchView, LayerCache


class Physical(NamedTuple):
    """Physical bytes of a pool."""

    mapped_bytes: int  # distinct page-groups mapped anywhere; an alias counts once
    pooled_bytes: int  # faulted in or created, but not mapped
    counted_bytes: int  # what the operating system or driver counts: mapped + pooled


class DriverCalls(NamedTuple):
    """Calls into the virtual-memory driver since the store was made."""

    critical: int  # on the critical path
    critical_s: float
    background: int  # in the background thread
    background_s: float
    waited_s: float  # critical path waiting for the background


class Store(ABC):
    """Real memory for one model's KV cache under one policy."""

    @abstractmethod
    def layer(self, layer: int) -> LayerCache:
        """K and V of one layer; the same tensors for the store's whole life."""

    @abstractmethod
    def apply(self, actions: Seq[Action]) -> None:
        """Perform actions now, on the critical path, after any that still run in the background."""

    @abstractmethod
    def apply_in_background(self, actions: Seq[Action]) -> None:
        """Start actions beside the forward pass; the next `apply` or `view` waits for them."""

    @abstractmethod
    def view(self, seq_ids: Seq[int], lengths: Seq[int], num_queries: Seq[int]) -> BatchView:
        """Say where the K/V of these sequences lies: lengths after this step's append, queries brought."""

    @abstractmethod
    def physical(self) -> Physical:
        """Physical bytes, counted by the operating system or driver."""

    @abstractmethod
    def driver_calls(self) -> DriverCalls:
        """Driver calls so far; zero for stores that make none."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back. The tensors must not be touched afterwards. Closing twice is allowed."""
