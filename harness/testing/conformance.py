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
from kvarena.allocators.reservation.static import StaticConfig, StaticPolicy
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


class _Scripted(ModelledExecutor):
    """Takes, step by step, the times it is told."""

    def __init__(self, durations_ps: Iterator[int]) -> None:
        super().__init__(StepModel(False, 1, 0, 0, 0, 0))
        self._durations_ps = durations_ps

    def execute(self, plan: StepPlan) -> StepTime:
        return StepTime(next(self._durations_ps))


class _Witness:
    """Writes down what is decided and said, and recounts the policy's books in every step."""

    def __init__(self, scheduler: Scheduler, executor: Executor) -> None:
        self.decisions: list[tuple[object, ...]] = []
        self.tokens: dict[int, list[int]] = {}  # known of each request, where there is a model to say them
        self._preemptions = self._most_running = 0
        self._policy, self._executor = scheduler.policy, executor

    def __call__(self, plan: StepPlan) -> None:
        self._policy.check_integrity()
        ids = [[r.seq_id for r in part] for part in (plan.decodes, plan.preempted, plan.swapped_out, plan.swapped_in)]
        chunks = [(chunk.request.seq_id, chunk.start, chunk.tokens) for chunk in plan.prefills]
        self.decisions.append((*ids, chunks, plan.actions, plan.ahead))
        if isinstance(self._executor, TorchExecutor):
            served = [*plan.decodes, *(chunk.request for chunk in plan.prefills)]
            self.tokens.update((request.seq_id, self._executor.known(request)) for request in served)
        self._preemptions += len(plan.preempted) + len(plan.swapped_out)
        self._most_running = max(self._most_running, len(plan.decodes) + len(plan.prefills))

    @property
    def seen(self) -> Checked:
        return Checked(len(self.decisions), self._preemptions, self._most_running)


def check_serving(make: PolicyMaker, *, pool_tokens: int = 150, kernel: str = "numba") -> Checked:
    """Serve a trace on real memory, and again under the modelled clock. Raises AssertionError where they differ from
    what static reservation with room for all yields, or from each other.
    """
    config: ModelConfig = typed(ModelConfig, load("model", "tiny-llama"), "model")
    model = build_model(config, "cpu")
    expected = _measured(model, _static, MAX_TOKENS * len(LENGTHS), kernel)[0].tokens
    measured, durations_ps = _measured(model, make, pool_tokens, kernel)
    for seq_id, (prompt, _) in enumerate(LENGTHS):
        said, right = (tokens[seq_id][prompt:] for tokens in (measured.tokens, expected))
        assert said == right, f"request {seq_id}: {said} instead of {right}"
    modelled, _ = _serve(_scheduler(make, config.kv_layout(), pool_tokens), _Scripted(iter(durations_ps)))
    for step, (wall, virtual) in enumerate(zip(measured.decisions, modelled.decisions, strict=True)):
        assert wall == virtual, f"step {step}: {wall} measured, {virtual} modelled"
    return measured.seen


def _static(kv_layout: KVLayout, pool_bytes: int, max_tokens: int) -> Policy:
    return StaticPolicy(StaticConfig(), kv_layout, pool_bytes, max_tokens=max_tokens)


def _scheduler(make: PolicyMaker, kv_layout: KVLayout, pool_tokens: int) -> Scheduler:
    return VllmScheduler(make(kv_layout, pool_tokens * kv_layout.token_bytes, MAX_TOKENS), VllmConfig(), MAX_TOKENS)


def _measured(model: Model, make: PolicyMaker, pool_tokens: int, kernel: str) -> tuple[_Witness, list[int]]:
    config = model.config
    scheduler = _scheduler(make, config.kv_layout(), pool_tokens)
    store = make_store(scheduler.policy, config.num_layers, config.num_kv_heads, config.head_size, config.dtype)
    try:
        return _serve(scheduler, TorchExecutor(model, store, get_kernel(kernel)))
    finally:
        store.close()


def _serve(scheduler: Scheduler, executor: Executor) -> tuple[_Witness, list[int]]:
    """What was decided and said, and the steps' times."""
    witness = _Witness(scheduler, executor)
    requests = [Request(i, prompt, output) for i, (prompt, output) in enumerate(LENGTHS)]
    done = Engine(scheduler, executor, jump=False, watch=witness).run(requests)
    ends = {r.seq_id: r.refusal or r.state for r in done.requests if r.state is not RequestState.FINISHED}
    assert not ends, f"requests that did not finish: {ends}"
    scheduler.policy.check_integrity()
    return witness, [int(ps) for ps in done.steps.to_frame().duration_ps]
