"""What preempting one request costs (PagedAttention Fig 19a): swap its blocks out and in again, or recompute them.

The copies are those that the paged policy decides for a request whose blocks lie scattered. Modelled, each has a price
(`harness/modelled/action_prices.py`) and the recomputation is a step of one prompt; measured, the store makes the
copies between the pool and host memory, and the model computes the prompt.
"""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import TypeVar

import pandas as pd
import torch

from kvarena.allocators.options import option
from kvarena.allocators.policy import Action, Admission, Policy, Sequence
from kvarena.errors import UserError
from kvarena.harness.engine.serving import Serving
from kvarena.harness.measured.timed_call import wait_for
from kvarena.harness.model.contract import Model
from kvarena.harness.modelled.step_model import PS_PER_S, StepLoad
from kvarena.harness.requests.request import Request
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System
from kvarena.harness.scheduler.step import PrefillChunk, StepPlan

T = TypeVar("T")
SWAP_OUT, SWAP_IN, SWAP, RECOMPUTE = "swap out", "swap in", "swap in+out", "recompute"
Costs = dict[str, float]  # what -> seconds


def modelled_costs(run: Run[object], system: System, tokens: int) -> Costs:
    """Seconds on the modelled device for a request of so many tokens."""
    serving = scattered(run, system, [tokens])
    out_ps, in_ps = (serving.prices.total_ps(actions) for actions in _swaps(serving.policy, 0))
    prompt_ps = serving.step_model.step_ps(StepLoad(tokens, 0, 0, tokens * (tokens + 1) // 2))
    return _costs(out_ps / PS_PER_S, in_ps / PS_PER_S, prompt_ps / PS_PER_S)


def _costs(out_s: float, in_s: float, recompute_s: float) -> Costs:
    return {RECOMPUTE: recompute_s, SWAP_IN: in_s, SWAP_OUT: out_s, SWAP: in_s + out_s}


def scattered(run: Run[object], system: System, lengths: list[int], model: Model | None = None) -> Serving:
    """The system holding sequences of these lengths, their blocks scattered, with room to swap all of them.

    Raises UserError for an allocator that swaps no blocks.
    """
    layout = run.model.shard().kv_layout()
    options = {field.name for field in fields(system.allocator)}
    if not {"block_size", "swap_bytes", "watermark"} <= options:
        raise UserError(f"systems: {system.name} ({system.allocator.name}) has no blocks that can be swapped")
    block: int = option(system.allocator, "block_size")
    pool_tokens = (2 * sum(lengths) // block + len(lengths) + 2) * block
    pool_bytes = pool_tokens * layout.token_bytes
    system = replace(system, allocator=replace(system.allocator, watermark=0.0, swap_bytes=pool_bytes))
    serving = Serving(run, system, pool_bytes=pool_bytes, context=run.model.max_tokens, model=model)
    policy = serving.policy
    _shuffle_free_blocks(policy, random.Random(run.model.seed))
    for seq_id, tokens in enumerate(lengths):
        admitted = policy.admit(Admission([Sequence(seq_id, tokens, output_tokens=1)], tokens))
        assert admitted is not None, "the pool was made for them"
    return serving


def _shuffle_free_blocks(policy: Policy, order: random.Random) -> None:
    """Take every block for a sequence of its own and give them back in random order: the free list is that order."""
    holders: list[int] = []
    while policy.admit(Admission([Sequence(len(holders), 1, output_tokens=1)], 1)) is not None:
        holders.append(len(holders))
    order.shuffle(holders)
    for seq_id in holders:
        policy.release(seq_id)


def _swaps(policy: Policy, seq_id: int) -> Iterator[list[Action]]:
    """Actions that swap a sequence out, then those that bring it back."""
    assert policy.swapping is not None  # there is a CPU pool
    policy.swapping.swap_out([seq_id])
    yield policy.drain()
    policy.swapping.swap_in([seq_id])
    yield policy.drain()


class PreemptionBench:
    """One block size, ready to be measured: a pool with several victims, together larger than the last-level cache."""

    def __init__(self, run: Run[object], system: System, model: Model, tokens: int, victims: int) -> None:
        serving = scattered(run, system, [tokens] * victims, model)
        self._policy, self._store, self.close = serving.policy, serving.store, serving.close
        self._executor = serving.torch_executor
        self._requests = [Request(i, tokens, output_tokens=1) for i in range(victims)]
        self._device = model.device
        for request in self._requests:
            self._recompute(request)

    def check(self) -> None:
        """Correctness before time: what was swapped out, overwritten and brought back is what it was.

        Raises RuntimeError where it is not.
        """
        victim = self._requests[0]
        before = self._contents(victim)
        swaps = _swaps(self._policy, victim.seq_id)
        held = self._blocks(victim)
        self._store.apply(next(swaps))
        self._last_layer[held] = 0
        self._store.apply(next(swaps))
        if not torch.equal(before, self._contents(victim)):
            raise RuntimeError("a request that was swapped out and in again has other K/V than before")

    def sample(self) -> Costs:
        """Mean seconds over all victims, once each."""
        table = pd.DataFrame([self._sample(request) for request in self._requests])
        return {str(what): float(mean) for what, mean in table.mean().items()}

    def _sample(self, request: Request) -> Costs:
        out_s, in_s = (self._timed(self._store.apply, actions) for actions in _swaps(self._policy, request.seq_id))
        return _costs(out_s, in_s, self._timed(self._recompute, request))

    def _recompute(self, request: Request) -> None:
        """What a step does for a request whose blocks were freed: compute K/V of all its tokens, and one token."""
        self._executor.finish(request)  # forget the token that the last time yielded
        self._executor.execute(StepPlan(prefills=[PrefillChunk(request, 0, request.prompt_tokens)]))

    @property
    def _last_layer(self) -> torch.Tensor:
        """Its K: [N, P, H, D]."""
        return self._store.layer(self._executor.model.config.num_layers - 1).k

    def _blocks(self, request: Request) -> torch.Tensor:
        held = self._policy.holdings([request])
        assert held is not None  # blocks
        return torch.tensor(held.of[request.seq_id].units, device=self._device)

    def _contents(self, request: Request) -> torch.Tensor:
        """K of the request in the last layer, position by position: [tokens, H, D]."""
        return self._last_layer[self._blocks(request)].flatten(0, 1)[: request.prompt_tokens].clone()

    def _timed(self, call: Callable[[T], object], argument: T) -> float:
        wait_for(self._device)
        start = time.perf_counter()
        call(argument)
        wait_for(self._device)
        return time.perf_counter() - start
