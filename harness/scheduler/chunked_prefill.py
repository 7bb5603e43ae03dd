"""Chunked prefill (Sarathi-Serve, OSDI'24; vLLM V1): decodes first, and what the budget leaves is cut from prompts."""

from collections import deque
from dataclasses import dataclass

from kvarena.allocators.policy import Policy
from kvarena.harness.requests.group import Group
from kvarena.harness.requests.request import Request
from kvarena.harness.scheduler.continuous import BatchLimits, token_budget
from kvarena.harness.scheduler.gangs import catch_up
from kvarena.harness.scheduler.scheduler import Scheduler
from kvarena.harness.scheduler.step import PrefillChunk, StepPlan


@dataclass
class ChunkedPrefillConfig(BatchLimits):
    """conf/scheduler/chunked_prefill.yaml, sarathi.yaml and vllm_v1.yaml."""

    name: str = "chunked_prefill"
    token_budget: int | None = 512
    max_seqs: int = 128
    whole_prompts: bool = False  # admission takes memory for the whole prompt (Sarathi-Serve), else chunk by chunk


class ChunkedPrefillScheduler(Scheduler):
    """Every request catches up with its known tokens, as many per step as the budget allows.

    Whoever runs comes first, in order of arrival; memory is given chunk by chunk; the latest arrival is preempted
    and recomputed. Nobody is admitted in a step that preempted.

    A group is given memory for its whole prompt at once, so that it is admitted whole or not at all. Recomputed, it
    feeds its prompt once, then each member's own tokens.
    """

    def __init__(self, policy: Policy, config: ChunkedPrefillConfig, max_tokens: int) -> None:
        super().__init__(policy, max_tokens)
        self.token_budget = token_budget(config, max_tokens)
        self.max_seqs = config.max_seqs
        self.whole_prompts = config.whole_prompts

    def may_change_batch(self) -> bool:
        """Whether a prompt is unfinished, or the head of the line fits."""
        budget = self.token_budget - len(self.running)
        if not all([r.is_decoding for r in self.running]):
            return True
        if not self.waiting or not budget:
            return False
        head = self.waiting[0]
        has_room = len(self.running) + head.width <= self.max_seqs
        return has_room and self._can_take(head, self._first_tokens(head, budget))

    def _first_tokens(self, head: Request, budget: int) -> int:
        """Tokens to take memory for on admission."""
        if head.group is not None:
            return head.prompt_tokens
        return head.known_tokens if self.whole_prompts else min(head.known_tokens, self._held(head) + budget)

    def _fill(self, plan: StepPlan) -> None:
        budget = self._serve_running(plan, self.token_budget)
        if not plan.preempted:
            self._admit(plan, budget)

    def _serve_running(self, plan: StepPlan, budget: int) -> int:
        """One position for each decode, a chunk for each unfinished prompt. Returns the budget left."""
        pending, self.running = deque(self.running), []
        while pending:
            request = pending.popleft()
            if request.group is not None:
                budget = self._serve_group(request.group, pending, plan, budget)
                continue
            tokens = min(request.known_tokens - request.computed, budget)
            given = self.whole_prompts and not request.is_decoding  # on admission
            while tokens and not (given or self.policy.grow(request.seq_id, tokens)):
                if self._evict_latest(pending, [request], plan):
                    break
            else:
                self.running.append(request)
                if request.is_decoding and tokens:
                    plan.decodes.append(request)
                elif tokens:
                    self._prefill(plan, request, tokens)
                budget -= tokens
        return budget

    def _serve_group(self, group: Group, pending: deque[Request], plan: StepPlan, budget: int) -> int:
        """One position for each member, a chunk of an unfinished prompt, or of what is recomputed after it."""
        members, first = group.members, group.first
        for _ in members[1:]:
            pending.popleft()
        wanted: list[tuple[int, int]] = []  # its whole prompt was given on admission
        chunks: list[PrefillChunk] = []
        decodes = group.is_decoding and budget >= len(members)
        if decodes:
            wanted = [(member.seq_id, 1) for member in members]
        elif group.is_decoding:
            pass  # all wait together
        elif first.computed < first.prompt_tokens:
            chunks = [PrefillChunk(first, first.computed, min(first.prompt_tokens - first.computed, budget))]
        else:
            chunks = catch_up(group, budget)
            wanted = [(chunk.request.seq_id, chunk.tokens) for chunk in chunks]
        for seq_id, tokens in wanted:
            while not self.policy.grow(seq_id, tokens):
                if self._evict_latest(pending, members, plan):
                    return budget
        self.running += members
        plan.decodes += members if decodes else []
        for chunk in chunks:
            if chunk.tokens:
                self._prefill(plan, chunk.request, chunk.tokens)
        return budget - (len(members) if decodes else sum([chunk.tokens for chunk in chunks]))

    def _evict_latest(self, pending: deque[Request], gang: list[Request], plan: StepPlan) -> bool:
        """Preempt whoever arrived last of those who have yet to be served; says whether that was the gang itself."""
        victims = self._pop_latest(pending) if pending else gang
        self._evict(victims, plan)
        return victims is gang

    def _admit(self, plan: StepPlan, budget: int) -> None:
        while self.waiting and budget:
            head = self.waiting[0]
            if len(self.running) + head.width > self.max_seqs:
                return
            if not self._take(head, self._first_tokens(head, budget), plan):
                return
            tokens = min(head.admission_tokens - head.computed, budget)
            budget -= tokens
            self.waiting.popleft()
            self._join(head)
            self._prefill(plan, head, tokens)
