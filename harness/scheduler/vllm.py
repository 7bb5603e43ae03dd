"""vLLM's scheduler of 2023 (PagedAttention section 4.5): grow until memory runs out, then preempt the latest."""

from collections import deque
from dataclasses import dataclass

from kvarena.allocators.policy import Policy
from kvarena.errors import UserError
from kvarena.harness.requests.group import Group
from kvarena.harness.requests.request import Request, RequestState
from kvarena.harness.scheduler.continuous import BatchLimits, ContinuousScheduler
from kvarena.harness.scheduler.gangs import catch_up, split_gangs
from kvarena.harness.scheduler.step import StepPlan

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

    A group is swapped. Where there is no CPU pool, or it is full, vLLM gives up; here the group is recomputed: its
    prompt once, in the step that admits it, then each member's own tokens, while nobody else is admitted.
    """

    def __init__(self, policy: Policy, config: VllmConfig, max_tokens: int) -> None:
        super().__init__(policy, config, max_tokens)
        if config.preemption not in PREEMPTIONS:
            raise UserError(f"scheduler.preemption={config.preemption}: is none of {', '.join(PREEMPTIONS)}")
        self._cpu_pool = policy.swapping
        if config.preemption == "swap" and self._cpu_pool is None:
            raise UserError(
                f"scheduler.preemption=swap: {policy.name} has no CPU pool (allocator.swap_bytes > 0 gives one)"
            )
        self.swapped: deque[Request] = deque()
        self._swaps_from = {"swap": 1, "auto": 2, "recompute": max_tokens}[config.preemption]  # sequences of a gang
        self._behind: Group | None = None  # has its prompt back, and feeds its members' own tokens; runs after that

    @property
    def has_work(self) -> bool:
        """Whether anyone runs, waits or is swapped out."""
        return bool(self.running or self.waiting or self.swapped or self._behind)

    @property
    def num_waiting(self) -> int:
        """Requests in line, the swapped ones included: they come first."""
        return len(self.waiting) + len(self.swapped)

    def may_change_batch(self) -> bool:
        """Whether the next in line fits: swapped requests come before waiting ones."""
        if self._behind is not None:
            return True
        return bool(self._fits_back()) if self.swapped else super().may_change_batch()

    def _fits_back(self) -> list[int]:
        """Sequences of the gang that comes back next, if they fit now."""
        if self._cpu_pool is None or not self.swapped:
            return []
        seq_ids = [member.seq_id for member in self.swapped[0].gang]
        has_room = len(self.running) + len(seq_ids) <= self.max_seqs
        return seq_ids if has_room and self._cpu_pool.can_swap_in(seq_ids) else []

    def _longest_prefill(self, request: Request) -> int:
        """A victim is recomputed with all its output but the last token; a group's outputs may be cut."""
        whole = request.group is None and self._swaps_from > 1
        return request.final_tokens - 1 if whole else request.prompt_tokens

    def _fill(self, plan: StepPlan) -> None:
        self._decode(plan)
        if not plan.swapped_out:
            self._swap_in(plan)
        plan.decodes = list(self.running)
        if self._behind is not None:
            self._catch_up(self._behind, plan)
        elif not self.swapped and not plan.preempted:
            self._admit(plan)

    def _decode(self, plan: StepPlan) -> None:
        """Give each running request its next position, in order of arrival; preempt the latest while one has none."""
        grown = 0
        while grown < len(self.running):
            grown += self._grow(self.running[grown:])
            if grown < len(self.running):
                self._preempt_latest(plan)

    def _grow(self, requests: list[Request]) -> int:
        """Give each of these its next position, gang by gang. Returns how many have got it."""
        seq_ids = [r.seq_id for r in requests]
        if not self.groups or self._sharing is None:
            return self.policy.grow_each(seq_ids)
        if self._sharing.grow_gang(seq_ids):  # as if they were one: nearly always there is memory for all
            return len(seq_ids)
        grown = 0
        for gang in split_gangs(requests):
            if not self._sharing.grow_gang([r.seq_id for r in gang]):
                break
            grown += len(gang)
        return grown

    def _preempt_latest(self, plan: StepPlan) -> None:
        """Evict a gang whole: to the CPU pool where it swaps and there is room, else to be recomputed."""
        if self._behind is not None:
            self._evict_behind(self._behind, plan)
            return
        gang = self._pop_latest(self.running)
        seq_ids = [victim.seq_id for victim in gang]
        pool = self._cpu_pool if len(gang) >= self._swaps_from else None
        if pool is None or not pool.can_swap_out(seq_ids):
            self._evict(gang, plan)
            return
        pool.swap_out(seq_ids)
        for victim in gang:
            victim.state = RequestState.SWAPPED
            self._pause(victim)
        self._forget(gang[0])
        self.swapped.appendleft(gang[0])
        plan.swapped_out += gang

    def _swap_in(self, plan: StepPlan) -> None:
        """Bring back whoever fits, in order of arrival; they decode at once."""
        while self._cpu_pool and (seq_ids := self._fits_back()):
            first = self.swapped.popleft()
            self._cpu_pool.swap_in(seq_ids)
            self.policy.grow_each(seq_ids)
            self._join(first)
            plan.swapped_in += first.gang

    def _enter(self, head: Request) -> None:
        if head.group is not None and head.generated:
            self._behind = head.group
        else:
            super()._enter(head)

    def _catch_up(self, group: Group, plan: StepPlan) -> None:
        """Feed what the members of a recomputed group had generated; in the step that feeds the last, it runs again."""
        chunks = catch_up(group, self.token_budget - len(plan.decodes))
        if not all([self.policy.grow(chunk.request.seq_id, chunk.tokens) for chunk in chunks]):
            self._evict_behind(group, plan)
            return
        plan.prefills += chunks
        if chunks[-1].is_last:
            self._behind = None
            self._join(group.first)

    def _evict_behind(self, group: Group, plan: StepPlan) -> None:
        self._behind = None
        self._evict(group.members, plan)
