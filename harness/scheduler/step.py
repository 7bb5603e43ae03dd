"""The plan of one iteration, and the contract of an executor: who runs it, and how long it took.

Prefill and decode tokens are mixed in one iteration. Every decode writes exactly one position, `request.computed`,
and yields one token; a prefill chunk writes `tokens` positions from `start` on, and yields a token if it reaches
the request's last known one.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from kvarena.allocators.policy import Action
from kvarena.harness.requests.request import Request

if TYPE_CHECKING:
    from kvarena.harness.requests.group import Group


class PrefillChunk(NamedTuple):
    """Positions [start, start + tokens) of a request's known tokens."""

    request: Request
    start: int
    tokens: int

    @property
    def is_last(self) -> bool:
        """Whether the chunk reaches the last known token, so that the step yields a new one."""
        return self.start + self.tokens >= self.request.known_tokens

    @property
    def readers(self) -> list[Request]:
        """Whose positions the chunk writes: the whole gang's where it is of their prompt."""
        return self.request.gang if self.start < self.request.prompt_tokens else [self.request]


@dataclass(slots=True)
class StepPlan:
    """One iteration, as the scheduler decided it; memory has been given, `request.computed` not yet advanced.

    `steps` > 1 stands for that many identical decode steps in a row. Only a modelled clock is ever handed one.
    """

    decodes: list[Request] = field(default_factory=list)
    prefills: list[PrefillChunk] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)  # to be recomputed; own no memory any more
    swapped_out: list[Request] = field(default_factory=list)  # actions hold the block copies; groups member by member
    swapped_in: list[Request] = field(default_factory=list)  # each of them decodes in this step
    actions: list[Action] = field(default_factory=list)  # before the forward pass, in this order
    ahead: list[Action] = field(default_factory=list)  # beside the forward pass, for the next iteration
    reused_tokens: int = 0  # with which requests were admitted in this step: a prefix's, or found in a cache
    padding: int = 0  # tokens fed beside the prompts, to make the rows of a batch equally long
    steps: int = 1

    @property
    def decoding(self) -> list[Request]:
        """Those that decode a token of their own: a row whose output is done only pads its batch. Before `complete`."""
        return [r for r in self.decodes if r.generated < r.output_tokens]

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to run."""
        return not self.decodes and not self.prefills

    @property
    def num_tokens(self) -> int:
        """Tokens fed to the model in one step."""
        return len(self.decodes) + sum(chunk.tokens for chunk in self.prefills) + self.padding


class StepTime(NamedTuple):
    """How long a plan took. In a stretch of steps each takes `slope_ps` longer than the one before."""

    duration_ps: int  # of all `plan.steps` steps together
    stall_ps: int = 0  # of it, waiting for the allocator: copies, swaps, driver calls
    slope_ps: int = 0


class Executor(ABC):
    """Runs a plan: on real memory with a real model, or as a device model prices it."""

    @abstractmethod
    def execute(self, plan: StepPlan) -> StepTime:
        """Run the iteration: actions, forward pass (with `plan.ahead` beside it), one token per sequence."""

    def survivors(self, group: "Group") -> Sequence[int]:
        """For each beam of a group, the beam that its next token continues, [n]: its own where it lives on.

        Asked once after each step that gave every beam a token. Beams that nobody continues are dead. Raises
        NotImplementedError where it serves no beams.
        """
        raise NotImplementedError(f"{type(self).__name__} ranks no beams")

    def finish(self, request: Request) -> None:  # noqa: B027
        """Hear that a request has ended and its memory is given back. Does nothing by default."""
