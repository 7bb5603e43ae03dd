"""A small trace served for real by one allocator, and every token that came of it."""

import time
from typing import NamedTuple

from kvarena.experiments.command.compose import compose_run
from kvarena.experiments.gpu_validation.step import Context
from kvarena.experiments.gpu_validation.steps.experiment_run import files_of
from kvarena.experiments.kit.replay import requests_of, workload_of
from kvarena.harness.engine.engine import Engine
from kvarena.harness.engine.serving import Serving
from kvarena.harness.measured.torch_executor import TorchExecutor
from kvarena.harness.model.contract import Model
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System
from kvarena.harness.scheduler.step import StepPlan

ALLOCATORS = ("static", "paged", "vattention")
# All arrive at once; prompts of 100 to 1,900 and 8 to 152 tokens, outputs of 7 to 133 and 4 to 76.
_SHORT = {
    "cuda": ["model=yi-6b", "model.dtype=bfloat16", "systems=[static-triton,paged-triton,vattention-triton]",
             "trace.prompt_tokens=1000", "trace.output_tokens=70", "trace.max_tokens=4096"],
    "cpu": ["model=tiny-llama", "model.dtype=float32", "systems=[static-numba,paged-numba,vattention-numba]",
            "trace.prompt_tokens=80", "trace.output_tokens=40", "trace.max_tokens=256"],
}  # fmt: skip
_ALIKE = ["experiment=memory_waste", "clock=measured", "arrival=all_at_once", "trace=random", "trace.num_requests=24",
          "trace.range_ratio=0.9"]  # fmt: skip


def uses(case: str) -> list[str]:
    """What a replay of either case uses: the experiment whose configuration it takes, and the kernel."""
    return [*files_of("memory_waste"), "kvarena.kernels.triton_attention"]


class Served(NamedTuple):
    """What came of a replay."""

    tokens: dict[int, list[int]]  # by request: prompt and output
    seconds: float
    preemptions: int
    driver_calls: int  # on the critical path
    executor: TorchExecutor

    @property
    def tokens_per_s(self) -> float:
        """Tokens of prompts and outputs, over the whole replay."""
        return sum(map(len, self.tokens.values())) / self.seconds


def make_run(context: Context) -> Run[object]:
    """The run whose systems are compared: ALLOCATORS, in that order, with one kernel body."""
    return compose_run(*_ALIKE, f"device={context.device}", *_SHORT[context.device])


def serve(
    run: Run[object], system: System, model: Model, memory: float, kind: type[TorchExecutor] = TorchExecutor
) -> Served:
    """Serve the trace; `memory` is the pool, over a longest row for each request. `kind` takes the steps."""
    workload = workload_of(run)
    pool_bytes = int(memory * len(workload) * run.context) * run.model.kv_layout().token_bytes
    tokens: dict[int, list[int]] = {}
    with Serving(run, system, pool_bytes=pool_bytes, model=model, executor=kind) as serving:
        executor = serving.torch_executor

        def keep(plan: StepPlan) -> None:
            served = [*plan.decodes, *(chunk.request for chunk in plan.prefills)]
            tokens.update((request.seq_id, executor.known(request)) for request in served)

        engine = Engine(serving.scheduler, executor, watch=keep)
        start = time.perf_counter()
        replay = engine.run(requests_of(workload, run))
        seconds = time.perf_counter() - start
        serving.policy.check_integrity()
        calls = serving.store.driver_calls().critical
    return Served(tokens, seconds, sum(r.num_preemptions for r in replay.requests), calls, executor)
