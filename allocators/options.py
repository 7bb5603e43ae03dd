"""What may be asked of options by those who do not know which allocator, or scheduler, they are of.

Options are a dataclass, another one for each policy. Who varies the unit of memory, or does without a watermark, asks
here which options have one.
"""

from dataclasses import replace
from typing import Any, TypeVar

Options = TypeVar("Options", bound=Any)  # a dataclass

_UNITS = ("block_size", "page_group")


def option(options: object, name: str, otherwise: Any = None) -> Any:
    """The value of an option, or `otherwise` where there is none of that name."""
    return getattr(options, name, otherwise)


def with_options(options: Options, **wanted: object) -> Options:
    """The options with those of `wanted` that they have."""
    return replace(options, **{name: value for name, value in wanted.items() if hasattr(options, name)})


def unit_option(options: object) -> str | None:
    """The option that sets the unit in which memory is given out: `block_size`, `page_group`, or none has."""
    return next((name for name in _UNITS if hasattr(options, name)), None)
