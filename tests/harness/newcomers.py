"""Policies of somebody else: they do what ours do, and inherit from the contract alone."""

import inspect

from kvarena.allocators.paged.policy import PagedPolicy
from kvarena.allocators.policy import Policy
from kvarena.allocators.vattention.policy import VAttentionPolicy

STATED = ("block_size", "geometries", "sharing", "cache", "swapping")  # what a policy says of itself


def delegate(name, member):
    """What passes a method, or a property, on to `self.inner`."""
    if isinstance(member, property):
        return property(lambda self: getattr(self.inner, name))
    return lambda self, *arguments, **named: getattr(self.inner, name)(*arguments, **named)


def newcomer(inner_class, *extras):
    """A policy class around an instance of another. `extras` are what its store asks for besides."""
    members = {
        name: delegate(name, member)
        for name, member in inspect.getmembers(Policy)
        if not name.startswith("_") and name not in STATED
        and (callable(member) or isinstance(member, property))
    }  # fmt: skip

    def begin(self, config, kv_layout, pool_bytes, max_tokens):
        self.inner = inner_class(config, kv_layout, pool_bytes, max_tokens)
        for name in ("kv_layout", "pool_bytes", "max_tokens", *STATED, *extras):
            if hasattr(self.inner, name):
                setattr(self, name, getattr(self.inner, name))

    also = {
        name: delegate(name, getattr(inner_class, name))
        for name in ("block_table", "row")
        if hasattr(inner_class, name)
    }
    layout = {"name": "newcomer", "memory_layout": inner_class.memory_layout, "__init__": begin}
    return type("Newcomer", (Policy,), members | also | layout)


NewcomerBlocks = newcomer(PagedPolicy, "num_blocks")
NewcomerRows = newcomer(VAttentionPolicy, "max_rows", "page_groups_per_tensor", "tensor_slicing")
