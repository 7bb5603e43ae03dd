"""Lengths that the user gives: one constant each, or uniform around it."""

import math

from kvarena.errors import UserError
from kvarena.harness.seeded import Stream
from kvarena.harness.trace.trace import Ints, Trace


def given_lengths(name: str, prompt: int, output: int, range_ratio: float, count: int, seed: int) -> Trace:
    """`count` requests, lengths uniform over [floor(l (1 - r)), ceil(l (1 + r))], as `vllm bench serve` has it.

    A ratio of 0 makes them constant, as in vAttention's Fig 8. Raises UserError for lengths below 1.
    """
    if not 0 <= range_ratio < 1:
        raise UserError(f"trace.range_ratio={range_ratio}: must be at least 0 and below 1")
    for key, length in (("prompt_tokens", prompt), ("output_tokens", output)):
        if length < 1:
            raise UserError(f"trace.{key}={length}: must be at least 1")
    facts = {"prompt_tokens": prompt, "output_tokens": output, "range_ratio": range_ratio}
    return Trace(
        name=name,
        source="given lengths",
        prompt_tokens=_uniform(Stream(seed, "prompts"), prompt, range_ratio, count),
        output_tokens=_uniform(Stream(seed, "outputs"), output, range_ratio, count),
        provenance={**facts, "requests": count, "seed": seed},
    )


def _uniform(stream: Stream, length: int, ratio: float, count: int) -> Ints:
    low, high = max(1, math.floor(length * (1 - ratio))), math.ceil(length * (1 + ratio))
    return low + stream.below(count, high - low + 1)
