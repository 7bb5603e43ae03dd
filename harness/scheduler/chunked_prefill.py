"""Chunked prefill (Sarathi-Serve, OSDI'24; vLLM V1): decodes first, and what the budget leaves is cut from prompts."""

from collections import deque
from dataclasses import dataclass

from kvarena.allocators.policy import Policy
from kvarena.harness.request import Request
from kvarena.harness.scheduler.continuous import BatchLimits, token_budget
from kvarena.harness.scheduler.scheduler import Scheduler
from kvarena.harness.step import PrefillChunk, StepPlan


@dataclass
class ChunkedPrefillConfig(BatchLimits):
    """conf/scheduler/chunked_prefill.yaml, and vllm_v1.yaml."""

    name: str = "chunked_prefill"
    token_budget: int | None = 512
    max_seqs: int = 128


class ChunkedPrefillScheduler(Scheduler):
    """Every request catches up with its known tokens, as many per step as the budget allows.

    Whoever runs comes first, in order of arrival; memory is given chunk by chunk; the latest arrival is preempted
    and recomputed. Nobody is admitted in a step that preempted.
    """

    def __init__(self, policy: Policy, config: ChunkedPrefillConfig, max_tokens: int) -> None:
        super().__init__(policy, max_tokens)
        self.token_budget = token_budget(config, max_tokens)
        self.max_seqs = config.max_seqs

    def may_change_batch(self) -> bool:
        """Whether a prompt is unfinished, or the head of the line fits."""
        budget = self.token_budget - len(self.running)
        if not all([r.is_decoding for r in self.running]):
            return True
        if not self.waiting or not budget or len(self.running) >= self.max_seqs:
            return False
        return self.policy.can_admit(self.waiting[0], min(self.waiting[0].known_tokens, budget))

    def _fill(self, plan: StepPlan) -> None:
        budget = self._serve_running(plan, self.token_budget)
        if not plan.preempted:
            self._admit(plan, budget)

    def _serve_running(self, plan: StepPlan, budget: int) -> int:
        """One position for each decode, a chunk for each unfinished prompt. Returns the budget left."""
        pending, self.running = deque(self.running), []
        while pending:
            request = pending.popleft()
            tokens = min(request.known_tokens - request.computed, budget)
            while tokens and not self.policy.grow(request.seq_id, tokens):
                victim = pending.pop() if pending else request
                self._evict(victim, plan)
                if victim is request:
                    break
            else:
                self.running.append(request)
                self._plan_tokens(request, tokens, plan)
                budget -= tokens
        return budget

    @staticmethod
    def _plan_tokens(request: Request, tokens: int, plan: StepPlan) -> None:
        if request.is_decoding and tokens:
            plan.decodes.append(request)
        elif tokens:
            plan.prefills.append(PrefillChunk(request, request.computed, tokens))

    def _admit(self, plan: StepPlan, budget: int) -> None:
        while self.waiting and budget and len(self.running) < self.max_seqs:
            head = self.waiting[0]
            tokens = min(head.known_tokens, budget)
            if not self.policy.admit(head, tokens):
                return
            budget -= tokens
            self.waiting.popleft()
            self._join(head)
            plan.prefills.append(PrefillChunk(head, 0, tokens))
