"""Names of a request's units (blocks, page-groups) in a prefix cache.

A unit's name is the source of its last token and its place: so equal names mean equal tokens up to its end
(`prompt.py`), which is what vLLM's hash of parent and tokens says, and a modelled clock needs no tokens for it.
"""

from collections.abc import Hashable

from kvarena.allocators.policy import PrefixCache
from kvarena.harness.requests.prompt import source_at
from kvarena.harness.requests.request import Request


class PromptNames:
    """Names by request, each made once. What follows a prompt is named as a conversation's, where its next turn repeats
    it, else as the request's own: recomputed after a preemption it is found again, and nobody else finds it. The
    members of a group write different tokens there, so of a group only the prompt has names.
    """

    def __init__(self, unit_tokens: int) -> None:
        self._unit_tokens = unit_tokens
        self._names: dict[int, list[Hashable]] = {}  # by request_id

    def of(self, request: Request, tokens: int) -> list[Hashable]:
        """Names of the units that lie wholly in the first `tokens` positions."""
        unit = self._unit_tokens
        count = (tokens if request.group is None else min(tokens, request.prompt_tokens)) // unit
        names = self._names.setdefault(request.request_id, [])
        for number in range(len(names), count):
            names.append((source_at(request, (number + 1) * unit - 1), number))
        return names[:count]

    def forget(self, request: Request) -> None:
        """Let go of the names of a request that has ended."""
        self._names.pop(request.request_id, None)


class CachedPrompts:
    """What a policy's prefix cache holds of requests."""

    def __init__(self, cache: PrefixCache) -> None:
        self._cache = cache
        self._names = PromptNames(cache.unit_tokens)
        self.forget = self._names.forget

    def found_tokens(self, request: Request) -> int:
        """Leading tokens of a request that waits which would be found now."""
        tokens = request.admission_tokens
        return self._cache.found_tokens(self._names.of(request, tokens), tokens)

    def found_names(self, request: Request) -> list[Hashable]:
        """Names of these tokens."""
        return self._names.of(request, self.found_tokens(request))

    def keep(self, request: Request, tokens: int) -> None:
        """Let the first tokens of a resident request be found."""
        self._cache.keep(request.seq_id, self._names.of(request, tokens))
