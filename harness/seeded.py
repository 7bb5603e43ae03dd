"""Random numbers that are the same on every platform and under every version of numpy.

Numpy promises that of a bit generator's raw stream alone: the methods of `Generator` may change between versions, and
`np.log` differs in its last bit between processors. So traces are drawn from raw 64-bit words with integer arithmetic,
and the one transcendental function they need is built here from operations that IEEE 754 rounds exactly.
"""

import numpy as np
from numpy.typing import NDArray

from kvarena.errors import UserError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Stream:
    """A named stream of raw words: streams of one seed but of different names are independent."""

    def __init__(self, seed: int, name: str) -> None:
        """Raises UserError for a negative seed."""
        if seed < 0:
            raise UserError(f"seed={seed}: a seed is a whole number, 0 or more")
        self._bits = np.random.PCG64(np.random.SeedSequence([seed, *name.encode()]))

    def words(self, count: int, bits: int) -> Ints:
        """`count` uniform integers of `bits` bits each, [count]; at most 63 bits."""
        return (self._bits.random_raw(count) >> np.uint64(64 - bits)).astype(np.int64)

    def below(self, count: int, limit: int) -> Ints:
        """`count` uniform integers in [0, limit), [count]; limit at most 2**31, bias at most 2**-32 of a share."""
        return (self.words(count, 32) * limit) >> 32

    def exponentials(self, count: int) -> Floats:
        """`count` draws of the exponential distribution of mean 1, [count]."""
        return np.negative(exact_log(self.uniforms(count)))

    def uniforms(self, count: int) -> Floats:
        """`count` uniform draws from the open interval (0, 1), [count]."""
        return (self.words(count, 52).astype(np.float64) + 0.5) * 2.0**-52

    def permutation(self, count: int) -> Ints:
        """A random order of range(count), [count]."""
        return np.argsort(self.words(count, 63), kind="stable")


def exact_log(x: Floats) -> Floats:
    """Natural logarithm of positive numbers, within 2 units in the last place and bitwise the same everywhere.

    ln(m 2^e) = e ln 2 + 2 artanh((m - 1) / (m + 1)), m in [0.7, 1.4]: the series needs terms up to s^21, and each
    operation is a numpy call of its own, so that no compiler can fuse two of them.
    """
    mantissa, exponent = np.frexp(x)  # mantissa in [0.5, 1)
    low = mantissa < 0.7071067811865476
    mantissa = np.where(low, mantissa * 2, mantissa)
    exponent = exponent - low
    s = (mantissa - 1) / (mantissa + 1)
    square = s * s
    series = np.full_like(s, 1 / 21)
    for odd in range(19, 0, -2):
        series = series * square + 1 / odd
    log: Floats = exponent * 0.6931471805599453 + 2 * s * series
    return log
