"""Batches that run to the end, as PagedAttention's evaluation drives FasterTransformer (section 6.1, and its artifact).

The earliest requests are padded to the longest prompt among them and decode for as long as the longest output; all
finish together. How many fit is the allocator's rule (allocators/reservation/fastertransformer.py).
"""

from dataclasses import dataclass

from kvarena.allocators.policy import Policy
from kvarena.harness.requests.request import Request
from kvarena.harness.scheduler.scheduler import Scheduler
from kvarena.harness.scheduler.step import StepPlan


@dataclass
class FasterTransformerConfig:
    """conf/scheduler/fastertransformer.yaml."""

    name: str = "fastertransformer"


class FasterTransformerScheduler(Scheduler):
    """One padded batch at a time; a row whose own output is done decodes on until the batch ends."""

    pads = True

    def __init__(self, policy: Policy, config: FasterTransformerConfig, max_tokens: int) -> None:
        super().__init__(policy, max_tokens)

    def _fill(self, plan: StepPlan) -> None:
        if not self.running:
            self._start_batch(plan)
            return
        for request in self.running:
            if not self.policy.grow(request.seq_id):
                raise ValueError(f"{self.policy.name} does not pad rows to the end of a batch")  # see `check_pair`
        plan.decodes = list(self.running)

    def _start_batch(self, plan: StepPlan) -> None:
        """Requests from the head of the line, as long as they have as many sequences as the first."""
        width = self.waiting[0].width
        while self.waiting and self.waiting[0].width == width:
            request = self.waiting[0]
            if not self._take(request, request.prompt_tokens, plan):
                break
            self.waiting.popleft()
            self._join(request)
            self._prefill(plan, request, request.prompt_tokens - request.computed)
        prompts = [chunk.tokens for chunk in plan.prefills]
        plan.padding = sum(max(prompts, default=0) - tokens for tokens in prompts)

    def may_change_batch(self) -> bool:
        """Nobody joins a batch that runs."""
        return not self.running

    def steps_left(self) -> int:
        """Steps until the next row is done, and only pads the batch from then on."""
        return min([left for r in self.running if (left := r.output_tokens - r.generated) > 0])

    def _retire(self, done: list[Request], now_ps: int) -> None:
        """Nobody leaves before the last row is done."""
        batch_ends = len(done) == len(self.running)
        super()._retire(done if batch_ends else [], now_ps)
