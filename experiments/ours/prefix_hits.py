"""How much of each prompt a prefix cache finds, if every request ends before the next one comes.

Who runs holds nothing here beside the one that is served, so this says what an allocator's cache can find in a pool of
that size, not what a server's load leaves of it.

    ids of the trace     |    a    |    b    |    c    |        a unit is named by the id at its end and its place: one
    units of the cache   |  (a, 0)   |  (b, 1)   |              that reaches into b is found where all of b is the same
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvarena.allocators.policy import Admission, Policy
from kvarena.allocators.policy import Sequence as Served
from kvarena.harness.seeded import Ints


@dataclass(frozen=True, slots=True)
class Hits:
    """Sums over a trace."""

    unit_tokens: int
    hit_tokens: int
    prompt_tokens: int
    cached_bytes: int  # that can be found at the end: all that is distinct, where the pool holds it
    refused: int  # requests that the pool cannot hold

    @property
    def ratio(self) -> float:
        """Share of all prompt tokens that need no prefill."""
        return self.hit_tokens / self.prompt_tokens


def count_hits(policy: Policy, ids: Sequence[Ints], prompt_tokens: Ints, block_tokens: int) -> Hits:
    """Serve prompts in order from an allocator with a prefix cache; `ids` are of blocks of the trace."""
    if policy.cache is None:
        raise ValueError(f"{policy.name} keeps nothing")
    found, refused, unit = 0, 0, policy.cache.unit_tokens
    for seq_id, (names, tokens) in enumerate(_named(unit, ids, prompt_tokens, block_tokens)):
        hit = policy.admit(Admission([Served(seq_id, tokens, 0)], tokens, names=names))
        policy.drain()
        policy.look_ahead()
        if hit is None:
            refused += 1
        else:
            found += hit
            policy.release(seq_id)
    return Hits(unit, found, int(prompt_tokens.sum()), policy.usage().cached, refused)


def _named(unit: int, ids: Sequence[Ints], prompt_tokens: Ints, block_tokens: int) -> Iterator[tuple[list[int], int]]:
    """Names of each prompt's units, and its tokens."""
    for mine, tokens in zip(ids, prompt_tokens.tolist(), strict=True):
        blocks = mine.tolist()
        yield [blocks[((j + 1) * unit - 1) // block_tokens] * 2**24 + j for j in range(tokens // unit)], tokens


def count_blocks(ids: Sequence[Ints], prompt_tokens: Ints, block_tokens: int) -> int:
    """Blocks that an endless cache of the trace's own blocks finds: full ones, at most n - 1 of n tokens (vLLM)."""
    full = [mine[: tokens // block_tokens] for mine, tokens in zip(ids, prompt_tokens.tolist(), strict=True)]
    most = [(tokens - 1) // block_tokens for tokens in prompt_tokens.tolist()]
    return _count(full, most)


def count_ids(ids: Sequence[Ints]) -> int:
    """The same where every id counts, a partly filled last block's too, as Mooncake counts."""
    return _count(ids, [len(mine) for mine in ids])


def _count(kept: Sequence[Ints], most: Sequence[int]) -> int:
    """Leading ids that came before, `most` of each at most."""
    seen: set[int] = set()
    found = 0
    for mine, limit in zip(kept, most, strict=True):
        blocks = mine.tolist()
        hit = 0
        while hit < limit and blocks[hit] in seen:
            hit += 1
        found += hit
        seen.update(blocks)
    return found
