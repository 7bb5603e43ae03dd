"""Mixtures: requests of one trace that are decoded in different ways, side by side in one batch.

Methods are named as PagedAttention's artifact names them: `n1`, `n4` are one and four samples, `n4-beam` a beam of
width 4, and `greedy` takes the likeliest token.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from kvarena.errors import UserError
from kvarena.harness.requests.decoding import GREEDY, DecodingConfig
from kvarena.harness.seeded import Stream

_NAME = re.compile(r"n(\d+)(-beam)?")


def decodings(given: DecodingConfig, mix: Mapping[str, float] | None, count: int, seed: int) -> list[DecodingConfig]:
    """How each of `count` requests is decoded: as given, or drawn with the shares of `mix`, which replace name and n.

    Raises UserError for a name that says nothing, and for shares that do not sum to 1.
    """
    if not mix:
        return [given] * count
    methods = [_named(name, given) for name in mix]
    shares = list(mix.values())
    if min(shares) < 0 or abs(sum(shares) - 1) > 1e-9:
        raise UserError(f"trace.mix={dict(mix)}: shares are 0 or more, and sum to 1")
    drawn = np.searchsorted(np.cumsum(shares), Stream(seed, "mix").uniforms(count), side="right")
    return [methods[min(i, len(methods) - 1)] for i in drawn.tolist()]


def _named(name: str, given: DecodingConfig) -> DecodingConfig:
    if name == "greedy":
        return GREEDY
    found = _NAME.fullmatch(name)
    if found is None:
        raise UserError(
            f"trace.mix: {name} names no method of decoding: greedy, n4 (samples) or n4-beam (a beam's width)"
        )
    return replace(given, name="beam" if found[2] else "parallel", n=int(found[1]))
