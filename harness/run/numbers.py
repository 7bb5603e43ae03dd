"""Numbers that no run can use: below zero, or not finite; refused before anything is measured."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass

from kvarena.errors import UserError

# Keys of `params` that may be 0: a seed, the start of a window, what may be left out, who need not be there.
_MAY_BE_0 = ("seeds", "window_s", "check_steps", "warmup_steps", "stagger", "spike_ms", "mapped", "created",
             "new_conversation")  # fmt: skip


def check_numbers(group: str, config: object) -> None:
    """Raises UserError for a number below 0, and for none that is finite (nan, inf)."""
    for key, number in _numbers(group, config):
        if not math.isfinite(number) or number < 0:
            raise UserError(f"{key}={number}: must be a finite number, and not below 0")


def check_given_params(params: object, given: Sequence[str]) -> None:
    """Raises UserError for a 0 that the user wrote into `params`, where it would leave nothing to measure."""
    for key, number in _numbers("params", params):
        written = any(key == each or key.startswith(f"{each}.") for each in given)
        if number == 0 and written and key.split(".")[-1] not in _MAY_BE_0:
            raise UserError(f"{key}={number}: must be {'at least 1' if isinstance(number, int) else 'above 0'}")


def _numbers(key: str, value: object) -> Iterator[tuple[str, float]]:
    """The numbers of a configuration, each with its dotted key; those of a list have the list's."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from _numbers(f"{key}.{name}", part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _numbers(key, part)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _numbers(f"{key}.{field.name}", getattr(value, field.name))
