"""The units that a file counts in: of its stamps, and of the blocks that its ids stand for.

Three formats have the fields `timestamp`, `input_length` and `output_length`. Mooncake's are whole milliseconds and ids
of 512 tokens, Bailian's seconds and ids of 16, GuideLLM's seconds. What the user says holds; then what the format says,
where its fields or its name leave no doubt; then what the records themselves tell, which is said; else it is asked for.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvarena.errors import UserError
from kvarena.harness.trace.config import TraceConfig
from kvarena.harness.trace.formats import LengthFormat

PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_NO_SECONDS = 10**11  # since 1970: the year 5138
BLOCKS = (512, 16)  # tokens of a block of Mooncake's and of Bailian's

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


class Units(NamedTuple):
    """What a file counts in."""

    time_unit: str  # of PER_SECOND, or formats.DATE
    block_tokens: int | None  # tokens that an id of hash_ids stands for; None: there are no ids
    assumed: tuple[str, ...] = ()  # what nobody has said


def check_units(config: TraceConfig) -> None:
    """Raises UserError for units that there are not."""
    if config.time_unit not in (None, *PER_SECOND):
        raise UserError(f"trace.time_unit={config.time_unit}: must be one of {', '.join(PER_SECOND)}")
    if config.block_tokens is not None and config.block_tokens < 1:
        raise UserError(f"trace.block_tokens={config.block_tokens}: must be at least 1")


def units_of(config: TraceConfig, form: LengthFormat, stamps: Floats, prompts: Floats, num_ids: Floats) -> Units:
    """The units of a source, by its well-formed records: their stamps, prompts in tokens and numbers of ids, all [n].

    Stamps and numbers of ids are NaN where a record has none. Raises UserError where a unit must be told.
    """
    block, by_ids = _block(config, form, prompts, num_ids)
    time, by_stamps = _time(config, form, stamps, block)
    return Units(time, block, tuple(filter(None, (by_stamps, by_ids))))


def _block(config: TraceConfig, form: LengthFormat, prompts: Floats, num_ids: Floats) -> tuple[int | None, str]:
    """Tokens of a block, and what is assumed: the size with which the number of ids is right in most records."""
    has_ids = num_ids > 0
    if config.block_tokens is not None or not has_ids.any():
        return config.block_tokens or form.block_tokens, ""
    sizes = dict.fromkeys([form.block_tokens, *BLOCKS] if form.block_tokens else BLOCKS)
    fitting = {size: int((num_ids == np.ceil(prompts / size))[has_ids].sum()) for size in sizes}
    best = max(fitting, key=lambda size: fitting[size])  # the format's own where others do no better
    if best == form.block_tokens:
        return best, ""
    if list(fitting.values()).count(fitting[best]) > 1:
        raise UserError(
            f"trace.block_tokens: what an id of {config.path} stands for is not to be seen from its prompts: say how "
            "many tokens (512 in Mooncake's traces, 16 in Bailian's)"
        )
    return best, f"an id stands for {best} tokens, by their number (trace.block_tokens)"


def _time(config: TraceConfig, form: LengthFormat, stamps: Floats, block: int | None) -> tuple[str, str]:
    """The unit of the stamps, and what is assumed."""
    stamps = stamps[np.isfinite(stamps) & (stamps != 0)]  # which is 0 in every unit
    if config.time_unit is None and form.time_unit == "s" and len(stamps) and stamps.min() >= _NO_SECONDS:
        raise UserError(
            f"trace.time_unit: {form.name} states seconds, and those of {config.path}, from {stamps.min():.15g} on, "
            "would be after the year 5000: say their unit, ms, us or ns"
        )
    if config.time_unit is not None or not form.shared or not len(stamps):
        return config.time_unit or form.time_unit, ""
    fractions = int((stamps % 1 != 0).sum())
    named = config.format is not None
    if named and (form.time_unit == "s" or not fractions):
        return form.time_unit, ""
    if not named and fractions > len(stamps) / 2:
        return "s", "its stamps are seconds, as they have fractions (trace.time_unit)"
    dates = stamps.min() >= 10**9  # in seconds since 1970; a trace in ms begins near 0
    if not named and not fractions and not dates and form.told_by and block == form.block_tokens:
        return form.time_unit, f"its stamps are {form.time_unit}, as in {form.name}'s (trace.time_unit)"
    seen = f"{fractions} have fractions, where Mooncake's are whole ms" if fractions else "all are whole numbers"
    raise UserError(
        f"trace.time_unit: the stamps of {config.path} are of a unit that nobody says ({seen}): say it, one of "
        f"{', '.join(PER_SECOND)}, or name the format: mooncake's are ms, bailian's and guidellm's s"
    )
