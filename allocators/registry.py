"""Allocation policies by name."""

from dataclasses import fields
from typing import Any

from kvarena.allocators.kv_layout import KVLayout
from kvarena.allocators.paged.policy import PagedConfig, PagedPolicy
from kvarena.allocators.policy import Policy
from kvarena.allocators.reservation.contiguous import ContiguousConfig, ContiguousPolicy
from kvarena.allocators.reservation.fastertransformer import FasterTransformerConfig, FasterTransformerPolicy
from kvarena.allocators.reservation.orca import OrcaConfig, OrcaPolicy
from kvarena.allocators.reservation.paged_reserved import PagedReservedConfig, PagedReservedPolicy
from kvarena.allocators.reservation.static import StaticConfig, StaticPolicy
from kvarena.allocators.vattention.policy import VAttentionConfig, VAttentionPolicy
from kvarena.errors import UserError
from kvarena.kernels.layout import Layout

# name -> dataclass of options, policy. Apart from `name`, the options are the policy's keyword arguments.
_POLICIES: dict[str, tuple[type[Any], type[Policy]]] = {
    "contiguous": (ContiguousConfig, ContiguousPolicy),
    "fastertransformer": (FasterTransformerConfig, FasterTransformerPolicy),
    "orca_max": (OrcaConfig, OrcaPolicy),
    "orca_oracle": (OrcaConfig, OrcaPolicy),
    "orca_pow2": (OrcaConfig, OrcaPolicy),
    "paged": (PagedConfig, PagedPolicy),
    "paged_reserved": (PagedReservedConfig, PagedReservedPolicy),
    "static": (StaticConfig, StaticPolicy),
    "vattention": (VAttentionConfig, VAttentionPolicy),
}

ALLOCATORS = tuple(_POLICIES)


def register(policy: type[Policy], config: type[Any]) -> None:
    """Let `make_policy` know a policy of your own, by the `name` of its dataclass of options.

    A system of it is made in code (notebooks/your_own_allocator.ipynb); to name it on the command line it needs its
    line above and a file in conf/allocator/. Raises UserError where another policy has that name.
    """
    name = config().name
    if _POLICIES.get(name, (None, policy))[1].__qualname__ != policy.__qualname__:
        raise UserError(f"allocator {name}: there is one of that name. There are: {', '.join(ALLOCATORS)}")
    _POLICIES[name] = (config, policy)


def config_class(name: str) -> type[Any]:
    """The dataclass of a policy's options. Raises UserError with the names that exist."""
    return _look_up(name)[0]


def policy_class(name: str) -> type[Policy]:
    """The policy's class. Raises UserError with the names that exist."""
    return _look_up(name)[1]


def memory_layout(name: str) -> Layout:
    """The layout in which a policy's K/V lies. Raises UserError with the names that exist."""
    return _look_up(name)[1].memory_layout


def make_policy(config: Any, kv_layout: KVLayout, pool_bytes: int, max_tokens: int) -> Policy:
    """The policy that a dataclass of options describes, over `pool_bytes`, for sequences of at most `max_tokens`.

    Raises UserError for a name that does not exist, an option out of range, and a pool that is too small.
    """
    options = {field.name: getattr(config, field.name) for field in fields(config)}
    make: Any = _look_up(options.pop("name"))[1]
    policy: Policy = make(kv_layout, pool_bytes, max_tokens=max_tokens, **options)
    return policy


def _look_up(name: str) -> tuple[type[Any], type[Policy]]:
    if name not in _POLICIES:
        raise UserError(f"allocator={name}: no such allocator. There are: {', '.join(ALLOCATORS)}")
    return _POLICIES[name]
