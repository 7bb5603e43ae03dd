"""Several sequences of one request in an iteration: what they feed, and which of those that run belong together."""

from collections.abc import Sequence

from kvarena.harness.requests.group import Group
from kvarena.harness.requests.request import Request
from kvarena.harness.scheduler.step import PrefillChunk


def catch_up(group: Group, budget: int) -> list[PrefillChunk]:
    """What a group that is recomputed feeds next, its prompt written again: each member's own tokens.

    All members yield their next token in one step. Where the budget does not hold all that is left, it is filled
    in order of members up to their last token, which then waits for the others.
    """
    left = [(member, member.known_tokens - member.computed) for member in group.members]
    if sum([tokens for _, tokens in left]) <= budget:
        return [PrefillChunk(member, member.computed, tokens) for member, tokens in left]
    chunks = []
    for member, tokens in left:
        take = min(tokens - 1, budget)
        if take > 0:
            chunks.append(PrefillChunk(member, member.computed, take))
            budget -= take
    return chunks


def split_gangs(requests: Sequence[Request]) -> list[list[Request]]:
    """Requests in order, those of one group together."""
    gangs: list[list[Request]] = []
    for request in requests:
        if request.group is None or not gangs or gangs[-1][0].group is not request.group:
            gangs.append([])
        gangs[-1].append(request)
    return gangs
