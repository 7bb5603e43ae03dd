"""A prefix that many requests begin with, kept by the provider (PagedAttention section 4.4, "shared prefix").

It is written once, before the first request arrives, and stays: its time and its memory are the provider's. Requests
that name it map what it holds and feed only what follows it.
"""

from dataclasses import dataclass

from kvarena.errors import UserError


@dataclass(frozen=True, slots=True)
class Prefix:
    """The first `tokens` positions of every prompt that names it; `prefix_id` is negative, no sequence's own."""

    prefix_id: int
    tokens: int

    def __post_init__(self) -> None:
        """Refuse what is no prefix."""
        if self.prefix_id >= 0:
            raise ValueError(f"prefix {self.prefix_id}: ids from 0 on are sequences'")
        if self.tokens < 1:
            raise UserError(f"a prefix of {self.tokens} tokens: has at least 1")

    def check(self, prompt_tokens: int) -> None:
        """Raises UserError for a prompt that has nothing after its prefix: its last token must be fed."""
        if prompt_tokens <= self.tokens:
            raise UserError(f"a prompt of {prompt_tokens} tokens does not reach past its prefix of {self.tokens}")
