"""Orca as PagedAttention's evaluation models it: memory is reserved on admission, so nobody is ever preempted."""

from dataclasses import dataclass

from kvarena.errors import UserError
from kvarena.harness.scheduler.continuous import BatchLimits, ContinuousScheduler
from kvarena.harness.scheduler.step import StepPlan


@dataclass
class OrcaConfig(BatchLimits):
    """conf/scheduler/orca.yaml."""

    name: str = "orca"
    max_seqs: int = 256


class OrcaScheduler(ContinuousScheduler):
    """First come, first served, with head-of-line blocking."""

    def _fill(self, plan: StepPlan) -> None:
        grown = self.policy.grow_each([r.seq_id for r in self.running])
        if grown < len(self.running):
            raise UserError(
                f"scheduler=orca never preempts, and {self.policy.name} ran out of memory for request "
                f"{self.running[grown].seq_id}: take an allocator that reserves, or another scheduler"
            )
        plan.decodes = list(self.running)
        self._admit(plan)
