"""One request of a replay: what it asks for, how far it is, and when things happened to it."""

from dataclasses import dataclass
from enum import StrEnum

from kvarena.allocators.policy import Sequence


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

    `computed` positions are in the cache. A decoding request has computed == prompt_tokens + generated - 1: its
    newest token is fed to the next step, which writes its K/V and yields the token after it.
    """

    arrival_ps: int = 0
    state: RequestState = RequestState.WAITING
    computed: int = 0  # positions whose K/V earlier steps have written
    generated: int = 0  # output tokens so far
    scheduled_ps: int | None = None  # start of the first step it took part in
    first_token_ps: int | None = None
    finish_ps: int | None = None
    paused_ps: int | None = None  # end of its last step, while a preemption keeps it from its next token
    num_preemptions: int = 0
    stall_ps: int = 0  # time its steps waited for the allocator: copies, swaps, driver calls
    refusal: str = ""

    @property
    def known_tokens(self) -> int:
        """Tokens whose values are known: the prompt and the output so far. A (re)computation prefills them all."""
        return self.prompt_tokens + self.generated

    @property
    def is_decoding(self) -> bool:
        """Whether its next step is a decode: one token in, one token out. A recomputation is a prefill to its end."""
        return self.generated > 0 and self.computed == self.known_tokens - 1 and self.paused_ps is None
