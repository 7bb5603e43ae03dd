"""vLLM's scheduler of 2023 (PagedAttention section 4.5): grow until memory runs out, then preempt the latest."""

from collections import deque
from dataclasses import dataclass

from kvarena.allocators.policy import Policy
from kvarena.errors import UserError
from kvarena.harness.request import Request, RequestState
from kvarena.harness.scheduler.continuous import BatchLimits, ContinuousScheduler
from kvarena.harness.step import StepPlan

PREEMPTIONS = ("auto", "recompute", "swap")


@dataclass
class VllmConfig(BatchLimits):
    """conf/scheduler/vllm.yaml."""

    name: str = "vllm"
    preemption: str = "auto"  # auto: recompute a request of one sequence, swap one of several


class VllmScheduler(ContinuousScheduler):
    """First come, first served; preempts the latest arrival, all of it or nothing.

    Swapped requests come back strictly before anyone waiting is admitted, and nobody is admitted in a step that
    preempted: a victim for recomputation stands at the head of the line again.
    """

    def __init__(self, policy: Policy, config: VllmConfig, max_tokens: int) -> None:
        super().__init__(policy, config, max_tokens)
        if config.preemption not in PREEMPTIONS:
            raise UserError(f"scheduler.preemption={config.preemption}: is none of {', '.join(PREEMPTIONS)}")
        if config.preemption == "swap" and not policy.can_swap:
            raise UserError(
                f"scheduler.preemption=swap: {policy.name} has no CPU pool (allocator.swap_bytes > 0 gives one)"
            )
        self.swapped: deque[Request] = deque()
        self._swaps = config.preemption == "swap"  # every request is one sequence: auto means recompute

    @property
    def has_work(self) -> bool:
        """Whether anyone runs, waits or is swapped out."""
        return bool(self.running or self.waiting or self.swapped)

    @property
    def num_waiting(self) -> int:
        """Requests in line, the swapped ones included: they come first."""
        return len(self.waiting) + len(self.swapped)

    def may_change_batch(self) -> bool:
        """Whether the next in line fits: swapped requests come before waiting ones."""
        if not self.swapped:
            return super().may_change_batch()
        return len(self.running) < self.max_seqs and self.policy.can_swap_in(self.swapped[0].seq_id)

    def _longest_prefill(self, request: Request) -> int:
        """A victim is recomputed with all its output but the last token."""
        return request.prompt_tokens if self._swaps else request.final_tokens - 1

    def _fill(self, plan: StepPlan) -> None:
        self._decode(plan)
        if not plan.swapped_out:
            self._swap_in(plan)
        plan.decodes = list(self.running)
        if not self.swapped and not plan.preempted:
            self._admit(plan)

    def _decode(self, plan: StepPlan) -> None:
        """Give each running request its next position, in order of arrival; preempt the latest while one has none."""
        grown = 0
        while grown < len(self.running):
            grown += self.policy.grow_each([r.seq_id for r in self.running[grown:]])
            if grown < len(self.running):
                self._preempt(self.running.pop(), plan)

    def _preempt(self, victim: Request, plan: StepPlan) -> None:
        """Evict a request whole: to the CPU pool where it swaps and there is room, else to be recomputed."""
        if not (self._swaps and self.policy.can_swap_out(victim.seq_id)):
            self._evict(victim, plan)
            return
        self.policy.swap_out(victim.seq_id)
        victim.state = RequestState.SWAPPED
        self._pause(victim)
        self.swapped.appendleft(victim)
        plan.swapped_out.append(victim)

    def _swap_in(self, plan: StepPlan) -> None:
        """Bring back whoever fits, in order of arrival; they decode at once."""
        while self.swapped and len(self.running) < self.max_seqs:
            request = self.swapped[0]
            if not self.policy.can_swap_in(request.seq_id):
                return
            self.swapped.popleft()
            self.policy.swap_in(request.seq_id)
            self.policy.grow(request.seq_id)
            self._join(request)
            plan.swapped_in.append(request)
