"""How much of each prompt a prefix cache finds, as if every request ended before the next one came.

A cache keeps whole *units*, blocks or page-groups, by what they hold and all that precedes it, and gives up the least
recently used: of one prompt its end before its beginning, as vLLM frees blocks. Who runs holds nothing here, so this
says what a cache of that many bytes can find, not what a server has left for it.

    ids of the trace     |    a    |    b    |    c    |        a page-group that reaches into block b is found again
    page-groups          | 0  | 1  | 2  | 3  | 4  | 5  |        only where all of b is the same: its identity is (b, 2)
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from kvarena.harness.seeded import Ints


@dataclass(frozen=True, slots=True)
class Unit:
    """What memory is kept in: unit j holds the bytes [j x size, (j + 1) x size) of each of `num_tensors` tensors."""

    size: int  # bytes in one tensor
    token_stride: int  # bytes of a token in one tensor
    num_tensors: int = 1

    @property
    def bytes(self) -> int:
        """Bytes of one unit, in all tensors."""
        return self.size * self.num_tensors

    @property
    def tokens_each(self) -> float:
        """Tokens that one unit holds, of one layer or of all: a page-group need not hold a whole number."""
        return self.size / self.token_stride

    def whole(self, tokens: int) -> int:
        """Units that lie wholly below a length."""
        return tokens * self.token_stride // self.size

    def tokens(self, units: int) -> int:
        """Tokens that lie wholly in so many units."""
        return units * self.size // self.token_stride

    def end(self, unit: int) -> int:
        """Length at which a unit is full: one more than the position of the last token that it has a part of."""
        return -(-(unit + 1) * self.size // self.token_stride)


@dataclass(frozen=True, slots=True)
class Hits:
    """Sums over a trace."""

    hit_tokens: int
    prompt_tokens: int
    units: int  # kept at the end: all distinct ones, where the cache has no limit

    @property
    def ratio(self) -> float:
        """Share of all prompt tokens that need no prefill."""
        return self.hit_tokens / self.prompt_tokens


def count_hits(
    ids: Sequence[Ints], prompt_tokens: Ints, block_tokens: int, unit: Unit, capacity_bytes: int | None = None
) -> Hits:
    """Serve prompts in order; None is a cache without a limit.

    Units are kept whole and hit one after the other from the beginning, at most n - 1 of n tokens: the last one must
    be fed for its logits. A prompt of more units than the cache holds is not kept.
    """
    limit = None if capacity_bytes is None else capacity_bytes // unit.bytes
    kept: OrderedDict[int, None] = OrderedDict()  # by time of use, the oldest first
    found = 0
    for mine, tokens in zip(ids, prompt_tokens.tolist(), strict=True):
        names = _names(mine.tolist(), unit, unit.whole(tokens), block_tokens)
        most, hit = unit.whole(tokens - 1), 0
        while hit < most and names[hit] in kept:
            hit += 1
        found += unit.tokens(hit)
        if limit is None or len(names) <= limit:
            _use(kept, names, limit)
    return Hits(found, int(prompt_tokens.sum()), len(kept))


def _names(ids: list[int], unit: Unit, count: int, block_tokens: int) -> list[int]:
    """What identifies each whole unit of a prompt: the block in which it ends, and its place."""
    return [ids[(unit.end(j) - 1) // block_tokens] * 2**24 + j for j in range(count)]


def _use(kept: OrderedDict[int, None], names: list[int], limit: int | None) -> None:
    """Make these the most recently used, the first of them last, and give up the oldest beyond the limit."""
    for name in reversed(names):
        kept[name] = None
        kept.move_to_end(name)
    if limit is not None:
        for _ in range(len(kept) - limit):
            kept.popitem(last=False)


def count_ids(ids: Sequence[Ints]) -> int:
    """Hits of a cache without a limit where every id counts, a partly filled last block's too, as Mooncake counts."""
    seen: set[int] = set()
    found = 0
    for mine in ids:
        for each in mine.tolist():
            if each not in seen:
                break
            found += 1
        seen.update(mine.tolist())
    return found
