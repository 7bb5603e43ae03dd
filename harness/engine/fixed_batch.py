"""One system decoding one fixed batch on real memory: what a cell of `decode_throughput` interleaves."""

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from kvarena.allocators.memory.store import Store
from kvarena.allocators.policy import Map
from kvarena.allocators.sizes import format_bytes
from kvarena.allocators.usage import LEAVES
from kvarena.errors import UserError
from kvarena.harness.engine.resident import make_resident
from kvarena.harness.engine.serving import Serving
from kvarena.harness.model.contract import Model
from kvarena.harness.requests.request import Request, RequestState
from kvarena.harness.scheduler.step import StepPlan
from kvarena.kernels.append import append


class StepRecord(NamedTuple):
    """One decode step of one system."""

    step_s: float  # scheduling, memory and forward pass
    schedule_s: float  # scheduler and policy, the booking of the result included
    actions_s: float  # actions on the critical path, the wait for background ones included
    view_s: float  # building the view of the batch
    append_s: float  # NaN where the step was one CUDA graph
    attention_s: float
    batch: int
    kv_tokens: int  # positions the attention reads
    growths: int  # new units (blocks, page-groups of every tensor) given in this step, or ahead of it
    actions: int  # driver or copy actions on the critical path
    ahead: int  # actions handed to the background


class FixedBatch:
    """A system with all its requests resident; every step decodes one token of each."""

    def __init__(self, serving: Serving, prompts: Sequence[int], steps: int) -> None:
        """Stand where a prefill would have left the batch: prompts cached, one token generated each."""
        self.scheduler, self.policy = serving.scheduler, serving.policy
        self.store, self.executor, self.close = serving.store, serving.torch_executor, serving.close
        self.requests = [
            Request(i, prompt, output_tokens=steps + 2, state=RequestState.RUNNING)  # it never ends within `steps`
            for i, prompt in enumerate(prompts)
        ]
        self.store.apply(make_resident(self.policy, self.requests))
        self.scheduler.running = list(self.requests)  # as if their prompts had been served one after the other
        warm = _WarmCache(self.executor.model, max(prompts))
        for request in self.requests:
            warm.fill(self.store, request)
            known = self.executor.known(request)
            known.append(known[-1])
            request.computed, request.generated = request.prompt_tokens, 1

    def step(self) -> StepRecord:
        """Decode one token of every sequence. Raises UserError where the pool cannot take it."""
        growths = sum([self.policy.tokens_until_growth(r.seq_id) == 0 for r in self.requests])
        start = time.perf_counter()
        plan = self.scheduler.schedule(now_ps=0)
        planned = time.perf_counter()
        self._refuse_preemption(plan)
        self.executor.execute(plan)
        executed = time.perf_counter()
        self.scheduler.complete(plan, now_ps=0)
        end = time.perf_counter()
        phases = self.executor.phases
        return StepRecord(
            step_s=end - start,
            schedule_s=planned - start + end - executed,
            actions_s=phases["actions"],
            view_s=phases["view"],
            append_s=phases.get("append", math.nan),
            attention_s=phases.get("attention", math.nan),
            batch=len(self.requests),
            kv_tokens=sum(r.computed for r in self.requests),
            growths=growths + sum(isinstance(action, Map) for action in plan.ahead),
            actions=len(plan.actions),
            ahead=len(plan.ahead),
        )

    def _refuse_preemption(self, plan: StepPlan) -> None:
        if len(plan.decodes) < len(self.requests):
            longest = max(r.computed for r in self.requests)
            raise UserError(
                f"{self.policy.name}'s pool of {format_bytes(self.policy.pool_bytes)} is full at {longest} tokens of "
                f"the longest of {len(self.requests)} sequences: raise params.pool_bytes or decode fewer steps"
            )

    def leaves(self) -> dict[str, int]:
        """Bytes by leaf, as they stand."""
        return dict(zip(LEAVES, self.policy.usage().leaves, strict=True))


class _WarmCache:
    """K/V to start from without a prefill: normal noise from a seed, the same for every system of a cell."""

    def __init__(self, model: Model, longest: int) -> None:
        self._local, self._longest = model.config, longest
        local, generator = model.config, torch.Generator().manual_seed(model.config.seed)
        noise = torch.randn(2, 2 * longest, local.num_kv_heads, local.head_size, generator=generator)
        self._noise = noise.to(device=model.device, dtype=getattr(torch, local.dtype))  # K and V: [2, 2 S, Hkv, D]

    def fill(self, store: Store, request: Request) -> None:
        """Write the prompt's K/V in every layer; sequence and layer choose where in the noise it starts."""
        view = store.view([request.seq_id], [request.prompt_tokens], [request.prompt_tokens])
        for layer in range(self._local.num_layers):
            start = (request.seq_id * 131 + layer * 17) % self._longest
            k, v = self._noise[:, start : start + request.prompt_tokens]
            append(k, v, store.layer(layer), view)
