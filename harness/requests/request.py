"""One request of a replay: what it asks for, how far it is, and when things happened to it.

A request of several sequences is several of these, one for each, in a `Group`.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from kvarena.allocators.policy import Sequence
from kvarena.harness.requests.decoding import GREEDY, DecodingConfig
from kvarena.harness.requests.prefix import Prefix
from kvarena.harness.requests.prompt import Span

if TYPE_CHECKING:
    from kvarena.harness.requests.group import Group


class RequestState(StrEnum):
    """Where a request is in its life."""

    WAITING = "waiting"  # arrived, or preempted for recomputation; owns no memory
    RUNNING = "running"  # owns memory
    SWAPPED = "swapped"  # preempted; its K/V lies in the CPU pool
    FINISHED = "finished"
    REFUSED = "refused"  # at arrival: it could never run; `refusal` says why


@dataclass(slots=True, eq=False)
class Request(Sequence):
    """A request. Times are picoseconds since the start of the replay; None means "not yet".

    `computed` positions are in the KV cache, written for this request or found there. A decoding request has
    computed == prompt_tokens + generated - 1: its newest token is fed to the next step, which writes its K/V and yields
    the token after it.
    """

    arrival_ps: int = 0
    state: RequestState = RequestState.WAITING
    computed: int = 0  # positions whose K/V earlier steps have written, or that it was admitted with
    generated: int = 0  # output tokens so far
    scheduled_ps: int | None = None  # start of the first step it took part in
    first_token_ps: int | None = None
    finish_ps: int | None = None
    paused_ps: int | None = None  # end of its last step, while a preemption keeps it from its next token
    num_preemptions: int = 0
    reused_tokens: int = 0  # that it was admitted with, a prefix's or the cache's; every time that it was
    stall_ps: int = 0  # time its steps waited for the allocator: copies, swaps, driver calls
    refusal: str = ""
    decoding: DecodingConfig = GREEDY  # how its tokens are chosen
    group: "Group | None" = field(default=None, repr=False)  # the sequences of one request, where there are several
    prefix: Prefix | None = None  # what its prompt begins with, where others' do too
    spans: tuple[Span, ...] = field(default=(), repr=False)  # of the prompt, from its beginning, that others' have too

    @property
    def gang(self) -> list["Request"]:
        """Whoever is admitted and preempted together with it, itself included."""
        return [self] if self.group is None else self.group.members

    @property
    def width(self) -> int:
        """Sequences of its gang."""
        return 1 if self.group is None else len(self.group.members)

    @property
    def request_id(self) -> int:
        """The seq_id of the first of its gang, which names the request."""
        return self.gang[0].seq_id

    @property
    def leads(self) -> bool:
        """Whether it stands for its gang in the line."""
        return self.group is None or self.group.first is self

    @property
    def known_tokens(self) -> int:
        """Tokens whose values are known: the prompt and the output so far. A (re)computation prefills them all."""
        return self.prompt_tokens + self.generated

    @property
    def admission_tokens(self) -> int:
        """Tokens to prefill on admission: all that are known, of a group its prompt, which is written once for all."""
        return self.known_tokens if self.group is None else self.prompt_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether its next step is a decode: one token in, one token out. A recomputation is a prefill to its end."""
        return self.generated > 0 and self.computed == self.known_tokens - 1 and self.paused_ps is None
