"""What prompts have in common: spans of known source.

    blocks of a trace      | block 7 ....| block 9 ....| own ..|     Mooncake's ids, which also stand for all before
    a conversation         | what was said in it so far .......|     each turn's prompt begins with the one before,
                                                                     and the answer that was given to it
    a prefix               | prefix .| own ....................|     (`prefix.py`)

Where two prompts have the same source at one position, they hold the same tokens up to there. A source is written as
the numbers that its tokens are drawn from, behind the seed of the run.
"""

from bisect import bisect_right
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from kvarena.harness.seeded import Ints

if TYPE_CHECKING:
    from kvarena.harness.requests.request import Request

Source = tuple[int, ...]

_PREFIX, _BLOCK, _CONVERSATION = 1, 2, 3  # second numbers of sources: they keep ids of different kinds apart
_64_BITS = 2**64 - 1


class Span(NamedTuple):
    """Positions [start, end) of a prompt, which hold what their source holds from its beginning."""

    source: Source
    start: int
    end: int


def block_spans(ids: Ints, block_tokens: int, prompt_tokens: int) -> tuple[Span, ...]:
    """A prompt whose blocks have ids; the last one may not be full."""
    starts = range(0, prompt_tokens, block_tokens)
    return tuple(
        Span((block & _64_BITS, _BLOCK), start, min(start + block_tokens, prompt_tokens))
        for block, start in zip(ids.tolist(), starts, strict=True)
    )


def conversation_span(conversation_id: int, prompt_tokens: int) -> tuple[Span, ...]:
    """A prompt that is a conversation so far."""
    return (Span((conversation_id & _64_BITS, _CONVERSATION), 0, prompt_tokens),)


def own_source(request: "Request") -> Source:
    """Of what a request shares with nobody."""
    return (request.request_id & _64_BITS,)


def prefix_source(prefix_id: int) -> Source:
    """Of a provider's prefix, whose id is negative."""
    return -prefix_id, _PREFIX


def spans_of(request: "Request") -> Iterator[Span]:
    """What a prompt shares with others; a later span replaces an earlier one. All else is its own."""
    yield from request.spans
    if request.prefix is not None:
        yield Span(prefix_source(request.prefix.prefix_id), 0, request.prefix.tokens)


def answer_source(request: "Request") -> Source | None:
    """Of what a request is going to say, where the trace says it: the next turn of its conversation repeats it.

    A replay then feeds the trace's tokens, whatever the model would choose, as it stops where the trace stops. Samples
    and beams say different things.
    """
    if not request.spans or request.decoding.name != "greedy":
        return None
    source = request.spans[-1].source
    return source if source[1:] == (_CONVERSATION,) else None


def source_at(request: "Request", position: int) -> Source:
    """Where the token at a position comes from. What is generated is the request's own, or a conversation's."""
    if request.prefix is not None and position < request.prefix.tokens:
        return prefix_source(request.prefix.prefix_id)
    span = bisect_right(request.spans, position, key=lambda span: span.end)
    if span < len(request.spans):
        return request.spans[span].source
    return answer_source(request) or own_source(request)
