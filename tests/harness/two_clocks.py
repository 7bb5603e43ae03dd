"""Holding two clocks to the same decisions: what a real replay said and decided, and one told its step times."""

from kvarena.harness.measured.torch_executor import TorchExecutor
from kvarena.harness.modelled.modelled_executor import ModelledExecutor
from kvarena.harness.modelled.step_model import StepModel
from kvarena.harness.scheduler.step import StepTime


class Keeper(TorchExecutor):
    """Keeps what finished sequences said, and who lived on."""

    def __init__(self, *args):
        super().__init__(*args)
        self.finished, self.lived_on = {}, []

    def finish(self, request):
        self.finished[request.seq_id] = self.known(request)[request.prompt_tokens :]
        super().finish(request)

    def survivors(self, group):
        self.lived_on.append(super().survivors(group))
        return self.lived_on[-1]


class Scripted(ModelledExecutor):
    """Takes, step by step, the times it is told, and lets those live on."""

    def __init__(self, durations_ps, survivors=()):
        super().__init__(StepModel(False, 1, 0, 0, 0, 0))
        self._durations_ps, self._survivors = iter(durations_ps), iter(survivors)

    def execute(self, plan):
        return StepTime(next(self._durations_ps))

    def survivors(self, group):
        return next(self._survivors)


def noted_decisions(scheduler):
    """What the scheduler decides from now on, step by step; its policy's books are checked whenever they change."""
    decisions, schedule, complete, rank = [], scheduler.schedule, scheduler.complete, scheduler.rank
    check = scheduler.policy.check_integrity

    def noted(now_ps):
        plan = schedule(now_ps)
        check()
        ids = [[r.seq_id for r in part] for part in (plan.decodes, plan.preempted, plan.swapped_out, plan.swapped_in)]
        chunks = [(chunk.request.seq_id, chunk.start, chunk.tokens) for chunk in plan.prefills]
        assert all(count > 0 for _, _, count in chunks), "at least the last token is fed"
        decisions.append((*ids, chunks, plan.actions, plan.ahead))
        return plan

    def completed(plan, now_ps):
        complete(plan, now_ps)
        check()

    def ranked(survivors):
        rank(survivors)
        check()

    scheduler.schedule, scheduler.complete, scheduler.rank = noted, completed, ranked
    return decisions
