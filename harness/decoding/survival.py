"""Which beams live on under the modelled clock, where no model gives scores. Evidence of such a replay: *conditional*.

In every step each of k beams has exactly one place in the next generation to fill; who fills it is all that memory can
see. A survival model says whose child fills it:

    all      its own: nobody dies, and nothing but the prompt is shared, as in parallel sampling
    one      one beam's, drawn uniformly, fills all k: the most that can be shared
    neutral  each place is filled by a beam drawn uniformly and by itself: scores favour nobody. This is the
             Wright-Fisher model of population genetics (Wright, Genetics 16, 1931): two beams descend from one a
             step ago with probability 1/k, so that on average they part k steps back

`all` and `one` bound the memory that any scores could lead to; `neutral` needs no constant. A draw depends on seed,
request and position alone, so that every allocator and every preemption sees the same.
"""

from collections.abc import Sequence
from functools import lru_cache

from kvarena.harness.requests.decoding import DecodingConfig

_WORD = (1 << 64) - 1


def seated(parents: Sequence[int]) -> list[int]:
    """Seat children so that as few as possible move: returns the child in each seat, [k].

    `parents[j]` is the parent of child j, the best first. The first child of a parent takes its seat, and the others
    the seats of the dead, in order. So `parents[child] == seat` wherever the parent of a seat lives on.
    """
    seats = [-1] * len(parents)
    moving = []
    for child, parent in enumerate(parents):
        if seats[parent] < 0:
            seats[parent] = child
        else:
            moving.append(child)
    for seat, child in enumerate(seats):
        if child < 0:
            seats[seat] = moving.pop(0)
    return seats


def sources(parents: Sequence[int]) -> tuple[int, ...]:
    """Seat by seat, the beam that the next one there continues, [k]; its own seat wherever it lives on."""
    return tuple(parents[child] for child in seated(parents))


def survivors(decoding: DecodingConfig, request_id: int, position: int) -> tuple[int, ...]:
    """Seat by seat, the beam that is continued there, [n]: `sources` of the parents that the model draws."""
    k = decoding.n
    if decoding.survival == "all":
        return tuple(range(k))
    word = _mixed(decoding.seed, request_id, position)
    if decoding.survival == "one":
        return (word * k >> 64,) * k
    return _neutral(k, word % _GENERATIONS)


_GENERATIONS = 1 << 14  # distinct draws of the neutral model that are told apart


@lru_cache(maxsize=1 << 16)
def _neutral(k: int, generation: int) -> tuple[int, ...]:
    """One generation of the Wright-Fisher model: k parents drawn uniformly."""
    return sources([_mixed(generation, place, k) * k >> 64 for place in range(k)])


def _mixed(a: int, b: int, c: int) -> int:
    """64 bits from three numbers, the same everywhere: the finalizer of SplitMix64, once for each."""
    word = 0
    for number in (a, b, c):
        word = (word + number + 0x9E3779B97F4A7C15) & _WORD
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
        word ^= word >> 31
    return word
