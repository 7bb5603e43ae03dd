"""A film of one modelled replay: a frame for every step, with what each request holds. The pictures are made of it."""

from dataclasses import dataclass, field
from typing import NamedTuple

import pandas as pd

from kvarena.allocators.holding import Holding
from kvarena.allocators.policy import Action
from kvarena.allocators.registry import make_policy
from kvarena.errors import UserError
from kvarena.experiments.kit.replay import pool_bytes_of, requests_of
from kvarena.harness.engine.engine import Engine
from kvarena.harness.engine.setup import make_step_model
from kvarena.harness.modelled.action_prices import action_prices
from kvarena.harness.modelled.modelled_executor import ActionPrices, ModelledExecutor
from kvarena.harness.modelled.step_model import StepModel
from kvarena.harness.requests.request import Request
from kvarena.harness.requests.request_log import request_frame
from kvarena.harness.requests.workload import Workload
from kvarena.harness.run.published import label_of
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System
from kvarena.harness.scheduler.registry import make_scheduler
from kvarena.harness.scheduler.scheduler import Scheduler
from kvarena.harness.scheduler.step import StepPlan, StepTime


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


class _Camera(ModelledExecutor):
    """Prices steps, and keeps a frame of each."""

    def __init__(self, model: StepModel, prices: ActionPrices, scheduler: Scheduler) -> None:
        super().__init__(model, prices)
        self.frames: list[Frame] = []
        self._scheduler = scheduler

    def execute(self, plan: StepPlan) -> StepTime:
        """Price the step."""
        policy, running = self._scheduler.policy, self._scheduler.running
        self.frames.append(
            Frame(
                decodes=tuple(r.seq_id for r in plan.decodes),
                prefills=tuple((chunk.request.seq_id, chunk.tokens) for chunk in plan.prefills),
                preempted=tuple(r.seq_id for r in plan.preempted),
                swapped_out=tuple(r.seq_id for r in plan.swapped_out),
                swapped_in=tuple(r.seq_id for r in plan.swapped_in),
                actions=tuple(plan.actions),
                ahead=tuple(plan.ahead),
                holdings={r.seq_id: policy.holding(r) for r in running},
                idle_units=policy.idle_units(),
            )
        )
        return super().execute(plan)


def film(run: Run, system: System, workload: Workload) -> Film:
    """Replay a workload with one system under the modelled clock, step by step.

    Raises UserError for an allocator whose memory cannot be told apart by request.
    """
    pool_bytes = pool_bytes_of(run, system)
    policy = make_policy(system.allocator, run.model.shard().kv_layout(), pool_bytes, run.context)
    scheduler = make_scheduler(system.scheduler, policy, run.context)
    units, prices = policy.units, action_prices(run.device, policy)
    if units is None:
        raise UserError(
            f"allocator {policy.name}: its memory cannot be told apart by request, so there is no picture of it"
        )
    camera = _Camera(make_step_model(run.device, run.engine, run.model, system), prices, scheduler)
    done = Engine(scheduler, camera, jump=False).run(requests_of(workload))
    return Film(
        system=label_of(run, system), unit_name=units.name, unit_tokens=units.tokens,
        num_units=units.num_units, pool_bytes=pool_bytes, prices=prices, requests=done.requests,
        frames=camera.frames, steps=done.steps.to_frame(),
    )  # fmt: skip
