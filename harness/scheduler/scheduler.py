"""What every scheduling policy shares: the queues, refusal at arrival, and the end of a step.

    submit --> waiting --(admitted)--> running --(last token)--> finished
       |          ^                       |
       v          +----(preempted)--------+
    refused

First come, first served: `running` and `waiting` are sorted by arrival, and whoever runs arrived before all who wait.
"""

from abc import ABC, abstractmethod
from bisect import insort
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq

from kvarena.allocators.policy import Admission, Policy
from kvarena.errors import UserError
from kvarena.harness.requests.group import Group
from kvarena.harness.requests.prefix import Prefix
from kvarena.harness.requests.prompt import answer_source
from kvarena.harness.requests.prompt_names import CachedPrompts
from kvarena.harness.requests.request import Request, RequestState
from kvarena.harness.scheduler.step import PrefillChunk, StepPlan


def by_arrival(request: Request) -> tuple[int, int]:
    """What "first come" means: ties by id."""
    return request.arrival_ps, request.seq_id


class Scheduler(ABC):
    """Decides, step by step, who runs. Talks to memory through the policy alone."""

    pads = False  # whether it decodes past the end of a row, to that of its batch

    def __init__(self, policy: Policy, max_tokens: int) -> None:
        self.policy = policy
        self.max_tokens = max_tokens  # the model's context
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.finished: list[Request] = []  # by the step just completed
        self.groups: list[Group] = []  # that run
        self.resumed_gaps_ps: list[int] = []  # between two tokens with a preemption in between
        self._prefixes: list[Prefix] = []  # that are kept
        self._sharing = policy.sharing
        self._cached = CachedPrompts(policy.cache) if policy.cache else None
        self._reuses = self._cached is not None  # whether a request may be admitted with K/V that is there already
        self._now_ps = 0  # start of the step being scheduled

    @abstractmethod
    def _fill(self, plan: StepPlan) -> None:
        """Decide one iteration: take memory for every position that it writes."""

    def refusal(self, request: Request) -> str:
        """Why a request could never run; empty where it could. A group is refused as a whole."""
        if request.final_tokens > self.max_tokens:
            return (
                f"request {request.seq_id}: prompt {request.prompt_tokens} + output {request.output_tokens} tokens "
                f"exceed the context of {self.max_tokens}"
            )
        if request.group is not None and self._sharing is None:
            raise UserError(f"allocator={self.policy.name} serves no requests of several sequences")
        refusal = self.policy.refusal(Admission(request.gang, request.prompt_tokens, 0, self._kept(request)))
        return f"request {request.seq_id}: {refusal}" if refusal else ""

    def submit(self, request: Request) -> None:
        """Put an arriving request at the end of the line, or refuse it; nobody behind it waits for a refused one.

        The first of a group stands for all of it.
        """
        refusal = self.refusal(request)
        if refusal:
            for member in request.gang:
                member.refusal, member.state = refusal, RequestState.REFUSED
        else:
            self.waiting.append(request)

    @property
    def has_work(self) -> bool:
        """Whether anyone runs or waits."""
        return bool(self.running or self.waiting)

    @property
    def num_waiting(self) -> int:
        """Requests that arrived, or came back, and do not run."""
        return len(self.waiting)

    @property
    def head(self) -> Request | None:
        """The request at the head of the line."""
        return self.waiting[0] if self.waiting else None

    def schedule(self, now_ps: int) -> StepPlan:
        """Decide the iteration that starts now."""
        plan = StepPlan()
        self._now_ps = now_ps
        self._fill(plan)
        plan.actions = self.policy.drain()
        plan.ahead = self.policy.look_ahead()
        for chunk in plan.prefills:
            if chunk.request.scheduled_ps is None:
                for member in chunk.readers:
                    member.scheduled_ps = now_ps
        return plan

    @abstractmethod
    def may_change_batch(self) -> bool:
        """Whether the next step could do more than decode for whoever runs, as long as memory lasts for that.

        Memory and room in the batch only shrink while a batch decodes: a no stands until someone finishes, or
        arrives at an empty line.
        """

    def steps_left(self) -> int:
        """Steps until the first of those who run leaves, if all of them decode."""
        return min([r.output_tokens - r.generated for r in self.running])

    def keep_prefix(self, prefix: Prefix) -> None:
        """Have a prefix resident from now on; requests that name it share it.

        Raises UserError where the context or the pool does not hold it.
        """
        if prefix.tokens > self.max_tokens:
            raise UserError(f"a prefix of {prefix.tokens} tokens exceeds the context of {self.max_tokens}")
        if self._sharing is None:
            raise UserError(f"allocator={self.policy.name} keeps no prefixes")
        self._sharing.keep_prefix(prefix.prefix_id, prefix.tokens)
        self._prefixes.append(prefix)
        self._reuses = True

    def _kept(self, head: Request) -> int | None:
        """The prefix of a request, where it is kept."""
        return head.prefix.prefix_id if head.prefix is not None and head.prefix in self._prefixes else None

    def _prefix_tokens(self, head: Request) -> int:
        """Leading tokens of a request that its prefix holds already: they are never fed."""
        return head.prefix.tokens if head.prefix is not None and head.prefix in self._prefixes else 0

    def _held(self, head: Request) -> int:
        """Leading tokens of a request that it would not feed if it were admitted now."""
        if not self._reuses:
            return 0
        if self._cached is None or self._kept(head) is not None:
            return self._prefix_tokens(head)
        return self._cached.found_tokens(head)

    def _admission(self, head: Request, tokens: int) -> Admission:
        """What a request asks for: its first tokens, for all of its gang, and later what a preempted group had."""
        if head.group is None and not self._reuses:
            return Admission([head], tokens)
        own = 0 if head.group is None else head.generated
        prefix = self._kept(head)
        names = self._cached.found_names(head) if self._cached and prefix is None else ()
        return Admission(head.gang, tokens, own, prefix, names)

    def _can_take(self, head: Request, tokens: int) -> bool:
        """Whether `_take` would succeed now."""
        return self.policy.can_admit(self._admission(head, tokens))

    def _take(self, head: Request, tokens: int, plan: StepPlan) -> bool:
        """Take memory for the first tokens of a request: for all of its gang, or for none.

        It has computed then what its prefix holds, or what is found in the cache.
        """
        held = self.policy.admit(self._admission(head, tokens))
        if held:
            for member in head.gang:
                member.computed = held
                member.reused_tokens += held
            plan.reused_tokens += held
        return held is not None

    def _prefill(self, plan: StepPlan, request: Request, tokens: int) -> None:
        """Plan a request's next tokens. What they fill can be found from now on.

        Whoever finds it reads it in this step at the earliest: there K/V is written before anyone attends to it.
        """
        chunk = PrefillChunk(request, request.computed, tokens)
        plan.prefills.append(chunk)
        if self._cached:
            for reader in chunk.readers:
                self._keep(reader, chunk.start + tokens)

    def _keep(self, request: Request, tokens: int) -> None:
        """Let the first tokens of a request be found."""
        if self._cached and self._kept(request) is None:
            self._cached.keep(request, tokens)

    def _pop_latest(self, requests: list[Request] | deque[Request]) -> list[Request]:
        """Take the latest arrival from those that run, with all its gang."""
        gang = requests[-1].gang
        for _ in gang:
            requests.pop()
        return gang

    def _evict(self, gang: list[Request], plan: StepPlan) -> None:
        """Take all memory of a running gang, and put it back into the line, to be recomputed."""
        for victim in gang:
            self._keep(victim, victim.computed)
        for victim in gang:
            self.policy.release(victim.seq_id)
            victim.computed = 0
            victim.state = RequestState.WAITING
            self._pause(victim)
        place, first = 0, gang[0]  # nearly always the head: it arrived before all who were never admitted
        while place < len(self.waiting) and by_arrival(self.waiting[place]) < by_arrival(first):
            place += 1
        self.waiting.insert(place, first)
        plan.preempted += gang
        self._forget(first)

    def _join(self, request: Request) -> None:
        """Let a request run, in its place by arrival; its gang beside it."""
        if request.group is not None:
            self.groups.append(request.group)
        for member in request.gang:
            member.state = RequestState.RUNNING
            insort(self.running, member, key=by_arrival)

    def _forget(self, first: Request) -> None:
        if first.group in self.groups:
            self.groups.remove(first.group)

    def _pause(self, victim: Request) -> None:
        victim.num_preemptions += 1
        if victim.paused_ps is None and victim.first_token_ps is not None:
            victim.paused_ps = self._now_ps  # its last token came at the end of the step before

    def _resume(self, request: Request, now_ps: int) -> None:
        """Note the gap before the first token since a preemption."""
        if request.paused_ps is not None:
            self.resumed_gaps_ps.append(now_ps - request.paused_ps)
            request.paused_ps = None

    def complete(self, plan: StepPlan, now_ps: int) -> None:
        """Book what a plan that ends now has computed; whoever has its last token leaves."""
        steps = plan.steps
        done = []
        for request in plan.decodes:
            request.computed += steps
            generated = request.generated = request.generated + steps
            if generated >= request.output_tokens:
                done.append(request)
        for chunk in plan.prefills:
            is_last = chunk.is_last
            for request in chunk.readers:
                request.computed = chunk.start + chunk.tokens
                if is_last:
                    request.generated += 1
                    if request.first_token_ps is None:
                        request.first_token_ps = now_ps
                    self._resume(request, now_ps)
                    if request.generated >= request.output_tokens:
                        done.append(request)
        for request in plan.swapped_in:
            self._resume(request, now_ps)
        self._retire(done, now_ps)

    def _retire(self, done: list[Request], now_ps: int) -> None:
        self.finished = done
        for request in done:
            request.finish_ps = now_ps
            request.state = RequestState.FINISHED
            if self._cached and answer_source(request) is not None:
                self._keep(request, request.computed)
            self.policy.release(request.seq_id)
            if self._cached:
                self._cached.forget(request)
        if done:
            self.running = [r for r in self.running if r.finish_ps is None]
            self.groups = [group for group in self.groups if group.first.finish_ps is None]

    @property
    def largest_gang(self) -> int:
        """Sequences of the largest gang that runs."""
        return max([len(group.members) for group in self.groups]) if self.groups else 1

    @property
    def shared_bytes(self) -> int:
        """What sharing saves now, where sequences that run may share memory."""
        if self._sharing is None or not (self.groups or self._reuses):
            return 0
        return self._sharing.shared_bytes

    @property
    def ranks_beams(self) -> bool:
        """Whether beams run, so that after every step some may die."""
        return bool(self.groups) and any([group.first.decoding.is_beam for group in self.groups])

    def rank(self, survivors: Callable[[Group], Seq[int]]) -> None:
        """Let dead beams go, and fork those that live on in their place; to be called after `complete`.

        Whoever dies gives back as much as its successor takes, so a fork finds memory.
        """
        for group in self.groups:
            if not group.needs_ranking:
                continue
            group.ranked = group.first.generated
            beams = group.members
            moves = [
                (beams[parent].seq_id, beams[seat]) for seat, parent in enumerate(survivors(group)) if parent != seat
            ]
            if moves and not (self._sharing and self._sharing.reseat(moves)):
                raise RuntimeError(f"{self.policy.name} has no room for a beam where one has just died")
