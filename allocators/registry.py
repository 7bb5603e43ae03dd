"""Allocation policies by name.

An allocator is one file of this folder: a dataclass of its options, and the policy that takes them, under `@allocator`.
The dataclass is all that says which options there are, what they mean, their defaults and their limits.
"""

import re
from collections.abc import Callable
from dataclasses import is_dataclass
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from kvarena.allocators.kv_layout import KVLayout
from kvarena.allocators.policy import Policy
from kvarena.errors import UserError, does_not_run
from kvarena.kernels.layout import Layout

P = TypeVar("P", bound=Policy)

_POLICIES: dict[str, tuple[Any, type[Policy]]] = {}  # name -> options with their defaults, policy


def allocator(*options: Any) -> Callable[[type[P]], type[P]]:
    """Let a policy be known by the `name` of its options; by several names, where it has presets.

    Raises UserError where another policy has that name, and for what is no policy, or no options of one.
    """

    def registered(policy: type[P]) -> type[P]:
        _check(policy)
        for each in options:
            if not _are_options(each):
                raise UserError(f"{policy.__qualname__}: its options are a dataclass that has a `name`, "
                                f"and are handed over with their defaults: @allocator(NameConfig())")  # fmt: skip
            other = _POLICIES.get(each.name, (each, policy))[1]
            if _said(other) != _said(policy):
                raise UserError(f"allocator {each.name}: there is one of that name: {_said(other)}, {_said(policy)}")
            _POLICIES[each.name] = (each, policy)
        return policy

    return registered


def _are_options(each: object) -> bool:
    return is_dataclass(each) and not isinstance(each, type) and isinstance(getattr(each, "name", None), str)


def _said(policy: type[Policy]) -> str:
    return f"{policy.__module__}.{policy.__qualname__}"


def _check(policy: type[Policy]) -> None:
    """Raises UserError where a policy lacks what the contract asks for."""
    if not issubclass(policy, Policy):
        raise UserError(f"{policy.__qualname__}: is no subclass of Policy (allocators/policy.py)")
    if lacking := sorted(policy.__abstractmethods__):
        raise UserError(f"{policy.__qualname__}: lacks {', '.join(lacking)}, which a policy must have")
    if not isinstance(getattr(policy, "memory_layout", None), Layout):
        layouts = ", ".join(f"Layout.{layout.name}" for layout in Layout)
        raise UserError(f"{policy.__qualname__}: states no memory_layout. There are: {layouts}")


def allocator_names() -> list[str]:
    """Names of all allocators, sorted."""
    _import_all()
    return sorted(_POLICIES)


def preset(name: str) -> Any:
    """A policy's options with the defaults of that name. Raises UserError with the names that exist."""
    return _look_up(name)[0]


def config_class(name: str) -> type[Any]:
    """The dataclass of a policy's options. Raises UserError with the names that exist."""
    return type(preset(name))


def policy_class(name: str) -> type[Policy]:
    """The policy's class. Raises UserError with the names that exist."""
    return _look_up(name)[1]


def memory_layout(name: str) -> Layout:
    """The layout in which a policy's K/V lies. Raises UserError with the names that exist."""
    return policy_class(name).memory_layout


def make_policy(config: Any, kv_layout: KVLayout, pool_bytes: int, max_tokens: int) -> Policy:
    """The policy that a dataclass of options describes, over `pool_bytes`, for sequences of at most `max_tokens`.

    Raises UserError for a name that does not exist, and a pool that is too small.
    """
    make: Callable[[Any, KVLayout, int, int], Policy] = policy_class(config.name)
    return make(config, kv_layout, pool_bytes, max_tokens)


def _look_up(name: str) -> tuple[Any, type[Policy]]:
    _import_all()
    if name not in _POLICIES:
        raise UserError(f"allocator={name}: no such allocator. There are: {', '.join(allocator_names())}")
    return _POLICIES[name]


@cache
def _import_all() -> None:
    """Import the files of this folder that have an allocator. Stores are none, and need torch."""
    folder = Path(__file__).parent
    for path in sorted(folder.rglob("*.py")):
        if re.search(r"^@allocator\(", path.read_text(), re.MULTILINE):
            module = ".".join((__package__, *path.relative_to(folder).with_suffix("").parts))
            imported(path, partial(import_module, module))


def imported(path: Path, run: Callable[[], object]) -> None:
    """Run a file. Raises UserError, with the line, for whatever it raises."""
    try:
        run()
    except Exception as error:  # of any kind: it is whatever the file does
        raise does_not_run(path, error) from error
