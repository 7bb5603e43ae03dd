"""Sampling: a token that depends on the scores and on (seed, request, sample, position), and on nothing else.

The Gumbel-max trick: with E a draw of the exponential distribution for each token, argmax(score / temperature - ln E)
is a draw from the softmax. Two sets of scores that differ in their last bits then differ in the token only where two
tokens all but tie, so that kernels of different rounding still sample alike.
"""

import numpy as np
from numpy.typing import NDArray

from kvarena.harness.requests.decoding import DecodingConfig
from kvarena.harness.seeded import Floats, Stream, exact_log


def sample(scores: NDArray[np.floating], decoding: DecodingConfig, request_id: int, member: int, position: int) -> int:
    """One token drawn from softmax(scores / temperature); scores [V]."""
    return int(
        np.argmax(
            scores.astype(np.float64) / decoding.temperature
            + _gumbel(len(scores), decoding.seed, request_id, member, position)
        )
    )


def _gumbel(count: int, seed: int, request_id: int, member: int, position: int) -> Floats:
    """`count` draws of the Gumbel distribution, [count]."""
    stream = Stream(seed, f"sample {request_id} {member} {position}")
    noise: Floats = np.negative(exact_log(stream.exponentials(count)))
    return noise
