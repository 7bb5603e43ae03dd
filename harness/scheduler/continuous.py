"""Iteration-level batching (Orca, OSDI'22): whole prompts join the running decodes, within limits of the batch."""

from dataclasses import dataclass

from kvarena.allocators.policy import Policy
from kvarena.errors import UserError
from kvarena.harness.requests.request import Request
from kvarena.harness.scheduler.scheduler import Scheduler
from kvarena.harness.scheduler.step import StepPlan


@dataclass
class BatchLimits:
    """What bounds an iteration."""

    token_budget: int | None = None  # tokens of a step, prompts and decodes; None: max(2560, model context)
    max_seqs: int = 2048


def token_budget(limits: BatchLimits, max_tokens: int) -> int:
    """The budget, resolved. Raises UserError where it does not hold a token of every sequence."""
    budget = max(2560, max_tokens) if limits.token_budget is None else limits.token_budget
    if limits.max_seqs < 1:
        raise UserError(f"scheduler.max_seqs={limits.max_seqs}: must be at least 1")
    if budget < limits.max_seqs:
        raise UserError(
            f"scheduler.token_budget={budget}: must be at least scheduler.max_seqs={limits.max_seqs}, "
            "so that everyone who runs can decode in every step"
        )
    return budget


class ContinuousScheduler(Scheduler):
    """Admits from the head of the line until one does not fit; prompts are never cut."""

    def __init__(self, policy: Policy, limits: BatchLimits, max_tokens: int) -> None:
        super().__init__(policy, max_tokens)
        self.token_budget = token_budget(limits, max_tokens)
        self.max_seqs = limits.max_seqs

    def refusal(self, request: Request) -> str:
        """As of every scheduler; and whatever would have to be prefilled at once must fit the token budget."""
        if request.width > self.max_seqs:
            return f"request {request.seq_id}: {request.width} sequences exceed a batch of {self.max_seqs}"
        tokens = self._longest_prefill(request) - self._prefix_tokens(request)
        if tokens > self.token_budget:
            return (
                f"request {request.seq_id}: {tokens} tokens to prefill in one step exceed the token budget "
                f"of {self.token_budget}"
            )
        return super().refusal(request)

    def _longest_prefill(self, request: Request) -> int:
        """The most tokens that one prefill of the request may have to take."""
        return request.prompt_tokens

    def may_change_batch(self) -> bool:
        """Whether the head of the line fits."""
        if not self.waiting:
            return False
        head, running = self.waiting[0], len(self.running)
        if running + head.width > self.max_seqs:
            return False
        tokens = head.admission_tokens
        return tokens - self._held(head) + running <= self.token_budget and self._can_take(head, tokens)

    def _admit(self, plan: StepPlan) -> None:
        """Admit in order of arrival, and stop at the first who does not fit. A prompt counts once for a group."""
        budget = self.token_budget - len(plan.decodes)
        while self.waiting:
            head = self.waiting[0]
            tokens, held = head.admission_tokens, self._held(head)
            fits = tokens - held <= budget and len(self.running) + head.width <= self.max_seqs
            if not (fits and self._take(head, tokens, plan)):
                return
            budget -= tokens - held
            self.waiting.popleft()
            self._enter(head)
            self._prefill(plan, head, tokens - held)
            if tokens < head.known_tokens:
                return  # a group to be recomputed: its members have their own tokens to feed before anyone else comes

    def _enter(self, head: Request) -> None:
        """Let an admitted request run."""
        self._join(head)
