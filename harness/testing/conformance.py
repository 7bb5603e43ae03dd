"""What every allocator must keep when it serves a model: the same tokens, and the same decisions under both clocks.

A trace too large for its pool is served on real memory by a tiny model. The pool is full most of the time, so requests
wait, grow, are preempted and come back; a wrong block table, a page given away too early or a lost position changes a
token. The step times of that replay are then fed to the modelled clock, which must decide the same.

    check_serving(lambda layout, pool_bytes, max_tokens: MyPolicy(layout, pool_bytes, max_tokens=max_tokens))
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kvarena.allocators.kv_layout import KVLayout
from kvarena.allocators.policy import Policy
from kvarena.allocators.reservation.static import StaticPolicy
from kvarena.allocators.stores import make_store
from kvarena.harness.config import load, typed
from kvarena.harness.engine.engine import Engine
from kvarena.harness.measured.torch_executor import TorchExecutor
from kvarena.harness.model import ModelConfig
from kvarena.harness.model.build import build_model
from kvarena.harness.model.contract import Model
from kvarena.harness.modelled.modelled_executor import ModelledExecutor
from kvarena.harness.modelled.step_model import StepModel
from kvarena.harness.requests.request import Request, RequestState
from kvarena.harness.scheduler.scheduler import Scheduler
from kvarena.harness.scheduler.step import Executor, StepPlan, StepTime
from kvarena.harness.scheduler.vllm import VllmConfig, VllmScheduler
from kvarena.kernels.registry import get_kernel

PolicyMaker = Callable[[KVLayout, int, int], Policy]  # (KV layout, bytes of the pool, tokens of the longest sequence)

MAX_TOKENS = 64
LENGTHS = ((23, 14), (7, 30), (40, 9), (3, 25), (31, 20), (12, 28), (17, 5), (26, 22), (5, 1), (9, 33), (38, 12))


@dataclass(frozen=True)
class Checked:
    """What a check saw: a pool that never filled proves little."""

    steps: int
    preemptions: int
    most_running: int


class _Keeper(TorchExecutor):
    """Keeps the tokens of finished requests."""

    outputs: dict[int, list[int]]

    def finish(self, request: Request) -> None:
        self.outputs = getattr(self, "outputs", {})
        self.outputs[request.seq_id] = self.known(request)[request.prompt_tokens :]
        super().finish(request)


class _Scripted(ModelledExecutor):
    """Takes, step by step, the times it is told."""

    def __init__(self, durations_ps: Iterator[int]) -> None:
        super().__init__(StepModel(False, 1, 0, 0, 0, 0))
        self._durations_ps = durations_ps

    def execute(self, plan: StepPlan) -> StepTime:
        return StepTime(next(self._durations_ps))


class _Witness:
    """Writes down what a scheduler decides, and recounts its policy's books after every step."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.decisions: list[tuple[object, ...]] = []
        self._preemptions = self._most_running = 0
        self._scheduler, self._schedule = scheduler, scheduler.schedule
        scheduler.schedule = self.schedule  # type: ignore[method-assign]

    def schedule(self, now_ps: int) -> StepPlan:
        plan = self._schedule(now_ps)
        self._scheduler.policy.check_integrity()
        ids = [[r.seq_id for r in part] for part in (plan.decodes, plan.preempted, plan.swapped_out, plan.swapped_in)]
        chunks = [(chunk.request.seq_id, chunk.start, chunk.tokens) for chunk in plan.prefills]
        self.decisions.append((*ids, chunks, plan.actions, plan.ahead))
        self._preemptions += len(plan.preempted) + len(plan.swapped_out)
        self._most_running = max(self._most_running, len(plan.decodes) + len(plan.prefills))
        return plan

    @property
    def seen(self) -> Checked:
        return Checked(len(self.decisions), self._preemptions, self._most_running)


def check_serving(make: PolicyMaker, *, pool_tokens: int = 150, kernel: str = "numba") -> Checked:
    """Serve a trace on real memory, and again under the modelled clock. Raises AssertionError where they differ from
    what static reservation with room for all yields, or from each other.
    """
    config: ModelConfig = typed(ModelConfig, load("model", "tiny-llama"), "model")
    model = build_model(config, "cpu")
    expected, _, _ = _measured(model, _static, MAX_TOKENS * len(LENGTHS), kernel)
    outputs, durations_ps, measured = _measured(model, make, pool_tokens, kernel)
    for seq_id, tokens in expected.items():
        assert outputs.get(seq_id) == tokens, f"request {seq_id}: {outputs.get(seq_id)} instead of {tokens}"
    scheduler = _scheduler(make, config.kv_layout(), pool_tokens)
    modelled = _Witness(scheduler)
    _serve(scheduler, _Scripted(iter(durations_ps)))
    for step, (wall, virtual) in enumerate(zip(measured.decisions, modelled.decisions, strict=True)):
        assert wall == virtual, f"step {step}: {wall} measured, {virtual} modelled"
    return measured.seen


def _static(kv_layout: KVLayout, pool_bytes: int, max_tokens: int) -> Policy:
    return StaticPolicy(kv_layout, pool_bytes, max_tokens=max_tokens)


def _scheduler(make: PolicyMaker, kv_layout: KVLayout, pool_tokens: int) -> Scheduler:
    return VllmScheduler(make(kv_layout, pool_tokens * kv_layout.token_bytes, MAX_TOKENS), VllmConfig(), MAX_TOKENS)


def _measured(
    model: Model, make: PolicyMaker, pool_tokens: int, kernel: str
) -> tuple[dict[int, list[int]], list[int], _Witness]:
    """Output tokens by request, the steps' times, and what was decided."""
    config = model.config
    scheduler = _scheduler(make, config.kv_layout(), pool_tokens)
    store = make_store(scheduler.policy, config.num_layers, config.num_kv_heads, config.head_size, config.dtype)
    try:
        witness, executor = _Witness(scheduler), _Keeper(model, store, get_kernel(kernel))
        durations_ps = _serve(scheduler, executor)
    finally:
        store.close()
    return executor.outputs, durations_ps, witness


def _serve(scheduler: Scheduler, executor: Executor) -> list[int]:
    requests = [Request(i, prompt, output) for i, (prompt, output) in enumerate(LENGTHS)]
    done = Engine(scheduler, executor, jump=False).run(requests)
    ends = {r.seq_id: r.refusal or r.state for r in done.requests if r.state is not RequestState.FINISHED}
    assert not ends, f"requests that did not finish: {ends}"
    scheduler.policy.check_integrity()
    return [int(ps) for ps in done.steps.to_frame().duration_ps]
