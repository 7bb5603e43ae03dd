"""A small trace served for real by one allocator, and every token that came of it."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from kvarena.allocators.memory.store import Store
from kvarena.allocators.registry import config_class, make_policy
from kvarena.allocators.stores import make_store
from kvarena.experiments.gpu_validation.step import Context
from kvarena.harness.config import load, typed
from kvarena.harness.engine.engine import Engine
from kvarena.harness.measured.torch_executor import TorchExecutor
from kvarena.harness.model import load_preset
from kvarena.harness.model.build import build_model
from kvarena.harness.model.contract import Model
from kvarena.harness.requests.request import Request
from kvarena.harness.scheduler.registry import config_class as scheduler_class
from kvarena.harness.scheduler.registry import make_scheduler
from kvarena.kernels.kernel import AttentionKernel
from kvarena.kernels.registry import get_kernel

ALLOCATORS = ("static", "paged", "vattention")
SEED = 7


class Size(NamedTuple):
    """How large the replay is."""

    model: str
    dtype: str
    kernel: str
    requests: int
    prompts: tuple[int, int]  # shortest, longest
    outputs: tuple[int, int]
    max_tokens: int
    page_group: str


SIZES = {
    "cuda": Size("yi-6b", "bfloat16", "triton", 24, (50, 2000), (20, 120), 4096, "2MB"),
    "cpu": Size("tiny-llama", "float32", "numba", 24, (5, 200), (5, 20), 256, "64KB"),
}


class Served(NamedTuple):
    """What came of a replay."""

    tokens: dict[int, list[int]]  # by request: prompt and output
    seconds: float
    preemptions: int
    driver_calls: int  # on the critical path

    @property
    def tokens_per_s(self) -> float:
        """Tokens of prompts and outputs, over the whole replay."""
        return sum(map(len, self.tokens.values())) / self.seconds


class Keeper(TorchExecutor):
    """Keeps the tokens of finished requests."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.kept: dict[int, list[int]] = {}

    def finish(self, request: Request) -> None:
        """Keep, then forget."""
        self.kept[request.seq_id] = list(self.known(request))
        super().finish(request)


MakeExecutor = Callable[[Model, Store, AttentionKernel, int], Keeper]


def make_model(context: Context) -> Model:
    """The model of the replay, with random weights."""
    size = SIZES[context.device]
    return build_model(load_preset(size.model, dtype=size.dtype), context.device)


def serve(model: Model, allocator: str, context: Context, memory: float, make: MakeExecutor = Keeper) -> Served:
    """Serve requests that all arrive at once; `memory` is the pool, over a longest row for each of them."""
    size, layout = SIZES[context.device], model.config.kv_layout()
    pool = int(memory * size.requests * size.max_tokens) * layout.token_bytes
    given = {"page_group": size.page_group} if allocator == "vattention" else {}
    config = typed(config_class(allocator), {**load("allocator", allocator), **given}, "allocator")
    policy = make_policy(config, layout, pool, size.max_tokens)
    scheduler = make_scheduler(
        typed(scheduler_class("vllm"), load("scheduler", "vllm"), "scheduler"), policy, size.max_tokens
    )
    local = model.config
    store = make_store(policy, local.num_layers, local.num_kv_heads, local.head_size, local.dtype, context.device)
    try:
        executor = make(model, store, get_kernel(size.kernel), SEED)
        start = time.perf_counter()
        replay = Engine(scheduler, executor).run(requests(size))
        seconds = time.perf_counter() - start
        policy.check_integrity()
        calls = store.driver_calls().critical
    finally:
        store.close()
    return Served(executor.kept, seconds, sum(r.num_preemptions for r in replay.requests), calls)


def requests(size: Size) -> list[Request]:
    """The same lengths every time."""
    draw = torch.Generator().manual_seed(SEED)
    prompts, outputs = (
        torch.randint(low, high + 1, (size.requests,), generator=draw).tolist()
        for low, high in (size.prompts, size.outputs)
    )
    return [Request(i, prompt, output) for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))]
