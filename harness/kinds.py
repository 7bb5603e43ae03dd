"""Kinds of values that a field may have, in words and as a check."""

from collections.abc import Mapping
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", NoneType: "null"}


def kind_of(hint: Any) -> str:  # what a type hint is has no type of its own
    """What a field of this type may hold, in words."""
    if get_origin(hint) in (Union, UnionType):
        kinds = get_args(hint)
        sizes = {int, str} <= set(kinds)
        said = ["bytes, or a size such as 64KB"] if sizes else []
        return " or ".join([*said, *(kind_of(kind) for kind in kinds if not (sizes and kind in (int, str)))])
    if get_origin(hint) is list:
        return f"a list, each {kind_of(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        return f"a mapping {{NAME: VALUE}}, each {kind_of(get_args(hint)[1])}"
    if is_dataclass(hint):
        return f"a mapping with {', '.join(hint.__dataclass_fields__)}"
    return _WORDS.get(hint, str(hint))


def is_of(hint: Any, value: object) -> bool:
    """Whether a value is of a field's type; a whole number is a number too."""
    if get_origin(hint) in (Union, UnionType):
        return any(is_of(kind, value) for kind in get_args(hint))
    if get_origin(hint) is list:
        return isinstance(value, list) and all(is_of(get_args(hint)[0], each) for each in value)
    if get_origin(hint) is dict:
        return isinstance(value, Mapping) and all(is_of(get_args(hint)[1], each) for each in value.values())
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return hint not in _WORDS or isinstance(value, hint)
