"""A film of one modelled replay: a frame for every step, with what each request holds. The pictures are made of it."""

from dataclasses import dataclass, field
from typing import NamedTuple

import pandas as pd

from kvarena.allocators.holding import Holding
from kvarena.allocators.policy import Action
from kvarena.errors import UserError
from kvarena.experiments.kit.replay import check_served, requests_of
from kvarena.harness.engine.engine import Engine
from kvarena.harness.engine.serving import Serving
from kvarena.harness.modelled.modelled_executor import ActionPrices
from kvarena.harness.requests.request import Request
from kvarena.harness.requests.request_log import request_frame
from kvarena.harness.requests.workload import Workload
from kvarena.harness.run.published import label_of
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System
from kvarena.harness.scheduler.scheduler import Scheduler
from kvarena.harness.scheduler.step import StepPlan


class Frame(NamedTuple):
    """One step, after scheduling and before the forward pass. Requests by id."""

    decodes: tuple[int, ...]
    prefills: tuple[tuple[int, int], ...]  # (id, tokens)
    preempted: tuple[int, ...]
    swapped_out: tuple[int, ...]
    swapped_in: tuple[int, ...]
    actions: tuple[Action, ...]  # before the forward pass
    ahead: tuple[Action, ...]  # beside it
    holdings: dict[int, Holding]  # of every running request
    idle_units: tuple[int, ...]


@dataclass
class Film:
    """A replay of one system, step by step."""

    system: str
    unit_name: str
    unit_tokens: float
    num_units: int
    pool_bytes: int
    prices: ActionPrices
    requests: list[Request] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)
    steps: pd.DataFrame = field(default_factory=pd.DataFrame)  # a row per frame, as harness/engine/step_log.py has them

    @property
    def request_table(self) -> pd.DataFrame:
        """What happened to each request."""
        return request_frame(self.requests).assign(system=self.system)


def _frame(plan: StepPlan, scheduler: Scheduler) -> Frame:
    held = scheduler.policy.holdings(scheduler.running)
    assert held is not None  # as at the start
    return Frame(
        decodes=tuple(r.seq_id for r in plan.decodes),
        prefills=tuple((chunk.request.seq_id, chunk.tokens) for chunk in plan.prefills),
        preempted=tuple(r.seq_id for r in plan.preempted),
        swapped_out=tuple(r.seq_id for r in plan.swapped_out),
        swapped_in=tuple(r.seq_id for r in plan.swapped_in),
        actions=tuple(plan.actions),
        ahead=tuple(plan.ahead),
        holdings=held.of,
        idle_units=held.idle,
    )


def film(run: Run[object], system: System, workload: Workload) -> Film:
    """Replay a workload with one system under the modelled clock, step by step.

    Raises UserError for an allocator whose memory cannot be told apart by request, and where all are refused.
    """
    serving, frames = Serving(run, system), list[Frame]()
    policy, scheduler = serving.policy, serving.scheduler
    if (nothing := policy.holdings([])) is None:
        raise UserError(
            f"allocator {policy.name}: its memory cannot be told apart by request, so there is no picture of it"
        )

    def keep(plan: StepPlan) -> None:
        frames.append(_frame(plan, scheduler))

    done = Engine(scheduler, serving.executor, jump=False, watch=keep).run(requests_of(workload))
    check_served(run, system, request_frame(done.requests))
    return Film(
        system=label_of(run, system), unit_name=nothing.units.name, unit_tokens=nothing.units.tokens,
        num_units=nothing.units.num_units, pool_bytes=policy.pool_bytes, prices=serving.prices,
        requests=done.requests, frames=frames, steps=done.steps.to_frame(),
    )  # fmt: skip
