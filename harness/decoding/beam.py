"""Beam search: of all continuations of k beams by one token, the k likeliest live on.

Hypotheses are forced to the trace's length, so that no end of sequence ever takes one out of the beam.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvarena.harness.decoding.survival import seated
from kvarena.harness.seeded import Floats, Ints


class Generation(NamedTuple):
    """The next beams, seat by seat; all arrays are [k]."""

    sources: tuple[int, ...]  # the beam that is continued there: its own seat's wherever that lives on
    tokens: list[int]
    totals: Floats  # accumulated log-probability


def first_generation(scores: NDArray[np.floating], width: int) -> Generation:
    """The `width` likeliest first tokens after a prompt; scores [V], V at least `width`."""
    log_probs = log_softmax(scores[None])[0]
    best = _best(log_probs, width)
    return Generation((0,) * width, best.tolist(), log_probs[best])


def next_generation(scores: NDArray[np.floating], totals: Floats) -> Generation:
    """The k best of k x V continuations; scores [k, V], totals [k]. Ties go to the lower seat, then the lower token."""
    width, vocabulary = scores.shape
    candidates = (totals[:, None] + log_softmax(scores)).ravel()  # [k x V]
    best = _best(candidates, width)
    parents, tokens = np.divmod(best, vocabulary)
    seats = seated(parents.tolist())
    sources = tuple(int(parents[child]) for child in seats)
    return Generation(sources, tokens[seats].tolist(), candidates[best[seats]])


def log_softmax(scores: NDArray[np.floating]) -> Floats:
    """Logarithm of the softmax along the last axis, in float64; scores [k, V]."""
    shifted = scores.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def _best(values: Floats, count: int) -> Ints:
    """Positions of the greatest values, the greatest first, of equal ones the earlier first: [count]."""
    least = np.partition(values, len(values) - count)[len(values) - count]
    candidates = np.flatnonzero(values >= least)  # more than `count` only where values tie
    order = np.argsort(-values[candidates], kind="stable")
    return candidates[order[:count]]
