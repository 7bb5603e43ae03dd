"""Allocation policies by name."""

from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from typing import Any, Protocol

from kvarena.allocators.kv_layout import KVLayout
from kvarena.allocators.policy import Policy
from kvarena.errors import UserError


class AllocatorConfig(Protocol):
    """A policy's dataclass of options: its fields are the keyword arguments of the policy, and its name."""

    name: str


# name -> module of this package, config dataclass, policy
_POLICIES = {
    "static": ("static", "StaticConfig", "StaticPolicy"),
    "orca_max": ("orca", "OrcaConfig", "OrcaPolicy"),
    "orca_pow2": ("orca", "OrcaConfig", "OrcaPolicy"),
    "orca_oracle": ("orca", "OrcaConfig", "OrcaPolicy"),
    "contiguous": ("contiguous", "ContiguousConfig", "ContiguousPolicy"),
    "fastertransformer": ("fastertransformer", "FasterTransformerConfig", "FasterTransformerPolicy"),
    "paged": ("paged", "PagedConfig", "PagedPolicy"),
    "paged_reserved": ("paged_reserved", "PagedReservedConfig", "PagedReservedPolicy"),
    "vattention": ("vattention", "VAttentionConfig", "VAttentionPolicy"),
}

ALLOCATORS = tuple(sorted(_POLICIES))


def config_class(name: str) -> type[Any]:
    """The dataclass of a policy's options. Raises UserError with the names that exist."""
    module, config, _ = _look_up(name)
    return getattr(module, config)  # type: ignore[no-any-return]


def make_policy(config: AllocatorConfig, kv_layout: KVLayout, pool_bytes: int, max_tokens: int) -> Policy:
    """The policy that `config` describes, over a pool of `pool_bytes`, for sequences of at most `max_tokens`.

    Raises UserError for a name that does not exist, an option out of range, and a pool that is too small.
    """
    module, _, policy = _look_up(config.name)
    make: Callable[..., Policy] = getattr(module, policy)
    options = {field.name: getattr(config, field.name) for field in fields(config) if field.name != "name"}  # type: ignore[arg-type]
    return make(kv_layout, pool_bytes, max_tokens=max_tokens, **options)


def _look_up(name: str) -> tuple[Any, str, str]:
    if name not in _POLICIES:
        raise UserError(f"allocator={name}: no such allocator. There are: {', '.join(ALLOCATORS)}")
    module, config, policy = _POLICIES[name]
    return import_module(f"kvarena.allocators.{module}"), config, policy
