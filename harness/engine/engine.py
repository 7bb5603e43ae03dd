"""The serving loop: arrivals -> scheduler -> policy -> executor -> record. One loop for both clocks.

Under the modelled clock it jumps: where the head of the line does not fit, whoever runs will only decode until a
sequence ends, somebody arrives at an empty line, memory may run short, or the step time changes branch. All steps up to
there are priced and recorded as one row, with the same times, decisions and sums as one by one.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kvarena.allocators.policy import Policy
from kvarena.allocators.usage import Usage
from kvarena.harness.engine.clock import Clock, ModelledClock, WallClock
from kvarena.harness.engine.step_log import StepLog
from kvarena.harness.modelled.modelled_executor import ModelledExecutor
from kvarena.harness.requests.prefix import Prefix
from kvarena.harness.requests.request import Request
from kvarena.harness.scheduler.scheduler import Scheduler, by_arrival
from kvarena.harness.scheduler.step import Executor, PrefillChunk, StepPlan, StepTime


@dataclass
class Replay:
    """What happened to every request, in order of arrival and member by member, and in every step."""

    requests: list[Request]
    steps: StepLog
    resumed_gaps_ps: list[int]  # between two tokens of one request with a preemption in between


def plan_of_prefix(prefix: Prefix, policy: Policy) -> StepPlan:
    """The step that writes a prefix, as if it were a prompt."""
    provider = Request(prefix.prefix_id, prefix.tokens, 0, prefix=prefix)
    return StepPlan(prefills=[PrefillChunk(provider, 0, prefix.tokens)], actions=policy.drain())


def _unwatched(plan: StepPlan) -> None:
    pass


class Engine:
    """Serves one trace. `jump=False` walks a modelled clock step by step, which gives the same and takes longer."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        *,
        jump: bool = True,
        prefixes: Iterable[Prefix] = (),
        watch: Callable[[StepPlan], None] = _unwatched,
    ) -> None:
        """Keeps the prefixes resident, and has them written. `watch` sees every step, and stretch of steps, before it
        is booked: memory and those who run are as the step has them.

        Raises UserError where a prefix finds no room.
        """
        self.scheduler = scheduler
        self.executor = executor
        self._watch = watch
        self._modelled = executor if isinstance(executor, ModelledExecutor) and jump else None
        self._log = StepLog()
        for prefix in prefixes:
            scheduler.keep_prefix(prefix)
            executor.execute(plan_of_prefix(prefix, scheduler.policy))

    def run(self, requests: Iterable[Request]) -> Replay:
        """Serve all requests to their end. They enter by arrival; ties by id."""
        arrivals = sorted(requests, key=by_arrival)
        clock: Clock = ModelledClock() if isinstance(self.executor, ModelledExecutor) else WallClock()
        scheduler, arrived = self.scheduler, 0
        while True:
            while arrived < len(arrivals) and arrivals[arrived].arrival_ps <= clock.now_ps:
                if arrivals[arrived].leads:
                    scheduler.submit(arrivals[arrived])
                arrived += 1
            if scheduler.has_work:
                self._step(clock, arrivals[arrived].arrival_ps if arrived < len(arrivals) else None)
            elif arrived < len(arrivals):
                clock.skip_to(arrivals[arrived].arrival_ps)
            else:
                return Replay(arrivals, self._log, scheduler.resumed_gaps_ps)

    def _step(self, clock: Clock, next_arrival_ps: int | None) -> None:
        """Take the step that starts now, or the whole stretch of steps up to the next event."""
        scheduler, start_ps = self.scheduler, clock.now_ps
        stretch = None
        if self._modelled is not None and self._may_jump(scheduler):
            gap_ps = None if next_arrival_ps is None or scheduler.num_waiting else next_arrival_ps - start_ps
            stretch = self._stretch(self._modelled, gap_ps)
        plan, time, usage = stretch or self._single(start_ps)
        self._watch(plan)
        shared_bytes = scheduler.shared_bytes * plan.steps
        clock.pass_step(time)
        end_ps = clock.now_ps
        self._log.add(start_ps, end_ps, plan, time, scheduler.num_waiting, usage, shared_bytes)
        if time.stall_ps:
            self._book_stall(plan, time.stall_ps)
        scheduler.complete(plan, end_ps)
        if scheduler.groups:
            scheduler.rank(self.executor.survivors)
        for request in scheduler.finished:
            self.executor.finish(request)

    @staticmethod
    def _may_jump(scheduler: Scheduler) -> bool:
        return bool(scheduler.running) and not scheduler.ranks_beams and not scheduler.may_change_batch()

    def _single(self, now_ps: int) -> tuple[StepPlan, StepTime, Usage]:
        scheduler = self.scheduler
        plan = scheduler.schedule(now_ps)
        if plan.is_empty:
            raise RuntimeError(f"nobody runs, and {scheduler.head} waits: {scheduler.policy.usage(scheduler.head)}")
        usage = scheduler.policy.usage(scheduler.head)
        return plan, self.executor.execute(plan), usage

    def _stretch(self, executor: ModelledExecutor, gap_ps: int | None) -> tuple[StepPlan, StepTime, Usage] | None:
        """All who run decode, up to the next event; `gap_ps` is the time to an arrival that might be admitted."""
        scheduler, policy = self.scheduler, self.scheduler.policy
        seq_ids = [r.seq_id for r in scheduler.running]
        plan = StepPlan(scheduler.running)
        ahead = executor.hidden_maps(plan)
        steps = policy.quiet_steps(seq_ids, scheduler.steps_left(), ahead, scheduler.largest_gang)
        if steps < 1:
            return None
        run = executor.steady(plan)
        plan.steps = min(steps, run.steps if gap_ps is None else min(run.steps, run.steps_to(gap_ps)))
        usage = policy.advance(seq_ids, plan.steps, scheduler.head)
        plan.ahead = policy.look_ahead()
        return plan, executor.stretch(plan, run), usage

    @staticmethod
    def _book_stall(plan: StepPlan, stall_ps: int) -> None:
        for request in plan.decoding:
            request.stall_ps += stall_ps
        for chunk in plan.prefills:
            chunk.request.stall_ps += stall_ps
