"""Replays: a workload served by the systems of a run, under either clock.

    trace + arrivals -> Workload -> Requests -> Engine -> what happened to each request, and in each step
                                                scheduler
                                                policy
                                                executor   modelled: a step model and a virtual clock
                                                           measured: model, store and kernel, and the wall

The clocks differ in the executor alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from kvarena.allocators.policy import Policy
from kvarena.allocators.registry import make_policy
from kvarena.errors import UserError
from kvarena.harness.config import load, typed
from kvarena.harness.decoding.mix import decodings
from kvarena.harness.engine.engine import Engine
from kvarena.harness.engine.setup import make_step_model
from kvarena.harness.modelled.action_prices import action_prices
from kvarena.harness.modelled.kv_pool import check_fits, kv_pool_bytes
from kvarena.harness.modelled.modelled_executor import ModelledExecutor
from kvarena.harness.requests.decoding import GREEDY, DecodingConfig
from kvarena.harness.requests.prefix import Prefix
from kvarena.harness.requests.request import Request
from kvarena.harness.requests.request_list import check_width, make_requests
from kvarena.harness.requests.request_log import request_frame
from kvarena.harness.requests.workload import Workload, make_workload
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System
from kvarena.harness.scheduler.registry import make_scheduler
from kvarena.harness.scheduler.scheduler import Scheduler
from kvarena.harness.scheduler.step import Executor
from kvarena.harness.trace.config import TraceConfig
from kvarena.harness.trace.file_arrivals import ASKED, RATES
from kvarena.harness.trace.told import tell, tell_once

if TYPE_CHECKING:  # a modelled replay needs no torch, which is half of what the process would hold
    from kvarena.harness.model.contract import Model

BLOCK_TOKENS = 16  # of the blocks in which an engine's pool is counted (`kv_blocks`)


def trace_named(run: Run, name: str, path: str | None = None) -> TraceConfig:
    """The run's own trace where it has that name, else conf/trace/<name>.yaml; read from `path` where there is one."""
    own: TraceConfig = run.trace if run.trace.name == name else typed(TraceConfig, load("trace", name), "trace")
    return replace(own, path=path or own.path)


def workload_of(run: Run, trace: TraceConfig | None = None, seed: int | None = None, **arrival: Any) -> Workload:
    """The run's workload, or that of another trace or seed, with arrivals changed as named (`rate`, `duration_s`).

    A trace that a table draws and its arrivals both follow the seed. What becomes of the trace is told: what is made
    here is served. `example_of` makes one that is not.
    """
    workload = example_of(run, trace, seed, **arrival)
    assert workload.account is not None, "a workload that is made from a trace has its account"
    tell(workload.account)
    return workload


def example_of(run: Run, trace: TraceConfig | None = None, seed: int | None = None, **arrival: Any) -> Workload:
    """A workload like those of `workload_of`, for notes that describe them: it counts as no replay."""
    trace, arrivals = trace or run.trace, replace(run.arrival, **arrival)
    if seed is not None:
        trace, arrivals = replace(trace, seed=seed), replace(arrivals, seed=seed)
    chosen = RATES if "rate" in arrival and run.arrival_chosen != ASKED else run.arrival_chosen
    return make_workload(trace, arrivals, run.context, chosen)


def pool_bytes_of(run: Run, system: System) -> int:
    """Bytes of K/V on one device: `params.pool_bytes`, else the pool that the engine's constants were fitted with,
    else what weights and activations leave of the device.

    Raises UserError where the clock is measured, and `params.pool_bytes` is not given; modelled, where the device has
    no room for it beside the weights.
    """
    given: int | None = getattr(run.params, "pool_bytes", None)
    if run.clock == "measured":
        if given is None:
            raise UserError("params.pool_bytes: under clock=measured a replay needs the bytes of the K/V pool")
        return given
    pool_bytes = _modelled_pool(run, system) if given is None else given
    check_fits(run.device, run.model, pool_bytes)
    return pool_bytes


def _modelled_pool(run: Run, system: System) -> int:
    fitted = run.engine.constants(run.model.name, system.scheduler.name)
    if fitted is not None and fitted.kv_blocks is not None:
        return int(fitted.kv_blocks * BLOCK_TOKENS * run.model.shard().kv_layout().token_bytes)
    return kv_pool_bytes(run.device, run.model) // run.model.tp


def requests_of(
    workload: Workload, run: Run | None = None, decoding: DecodingConfig | None = None, prefix: Prefix | None = None
) -> list[Request]:
    """Fresh requests: a replay writes into them. Decoded as asked for, else as the run says, else greedily."""
    if run is None:
        return make_requests(workload, [decoding or GREEDY] * len(workload), prefix)
    mix = run.trace.mix if decoding is None else None
    ways = decodings(decoding or run.decoding, mix, len(workload), run.trace.seed)
    check_width(ways, run.model.vocab_size)
    return make_requests(workload, ways, prefix)


class Served(NamedTuple):
    """What happened to each request (`harness/requests/request_log.py`), and in each step or stretch of steps.

    Steps are as `harness/engine/step_log.py` has them.
    """

    requests: pd.DataFrame
    steps: pd.DataFrame
    resumed_gaps_ps: list[int]  # as `harness/record/metrics.py` takes them


class Replayer:
    """Serves workloads with the systems of a run. Under the measured clock all systems share one model, and each first
    serves two short requests: what is compiled or loaded then is not timed.

    One device's share is served: the others of a tensor-parallel group do the same, at the same time. `jump=False` has
    the log of a modelled replay keep every iteration by itself.
    """

    def __init__(self, run: Run, *, jump: bool = True) -> None:
        """Raises UserError for a system of the run that cannot serve here at all: before any of them is replayed."""
        self._run, self._jump = run, jump
        for system in run.systems:
            self._set_up(system)
            if run.clock == "modelled":
                make_step_model(run.device, run.engine, run.model, system)
        self._warm: set[tuple[str, str]] = set()

    def serve(
        self,
        system: System,
        workload: Workload,
        decoding: DecodingConfig | None = None,
        prefix: Prefix | None = None,
        share_prefix: bool = True,
    ) -> Served:
        """Serve all requests to their end, decoded as asked for, else as the run says.

        All prompts begin with `prefix`, which is kept resident and shared, or fed with every prompt. Raises UserError
        where every request is refused.
        """
        if self._run.clock == "measured":
            self._warm_up(system, workload)
        served = self._serve(system, workload, decoding, prefix, share_prefix)
        if len(workload) and served.steps.empty:
            raise UserError(f"{system.name} refuses all {len(workload)} requests; {served.requests.refusal.iloc[0]}")
        tell_refusals(system, served.requests)
        return served

    def _serve(
        self,
        system: System,
        workload: Workload,
        decoding: DecodingConfig | None = None,
        prefix: Prefix | None = None,
        share_prefix: bool = True,
    ) -> Served:
        run = self._run
        policy, scheduler = self._set_up(system)
        with self._executor(system, policy) as executor:
            kept = [prefix] if prefix is not None and share_prefix else []
            engine = Engine(scheduler, executor, jump=self._jump, prefixes=kept)
            done = engine.run(requests_of(workload, run, decoding, prefix))
        requests, steps = request_frame(done.requests), done.steps.to_frame()
        return Served(requests.assign(system=system.name), steps.assign(system=system.name), done.resumed_gaps_ps)

    def _set_up(self, system: System) -> tuple[Policy, Scheduler]:
        run = self._run
        layout = run.model.shard().kv_layout()
        policy = make_policy(system.allocator, layout, pool_bytes_of(run, system), run.context)
        return policy, make_scheduler(system.scheduler, policy, run.context)

    def _warm_up(self, system: System, workload: Workload) -> None:
        kind = (system.allocator.name, system.kernel.name)
        if kind not in self._warm:
            self._warm.add(kind)
            prompts, outputs = workload.prompt_tokens[:2], workload.output_tokens[:2].clip(max=4)
            self._serve(system, Workload(prompts, outputs, workload.arrival_ps[:2] * 0))

    @contextmanager
    def _executor(self, system: System, policy: Policy) -> Iterator[Executor]:
        run = self._run
        if run.clock == "modelled":
            step_model = make_step_model(run.device, run.engine, run.model, system)
            yield ModelledExecutor(step_model, action_prices(run.device, policy))
            return
        from kvarena.allocators.stores import make_store
        from kvarena.harness.measured.torch_executor import TorchExecutor
        from kvarena.kernels.registry import get_kernel

        local = self._model.config
        store = make_store(
            policy, local.num_layers, local.num_kv_heads, local.head_size, local.dtype, self._model.device
        )
        try:
            kernel = get_kernel(system.kernel.name)
            yield TorchExecutor(self._model, store, kernel, local.seed, run.engine.cuda_graphs)
        finally:
            store.close()

    @cached_property
    def _model(self) -> "Model":
        from kvarena.harness.model.build import build_model

        return build_model(self._run.model, self._run.device.kind)


def tell_refusals(system: System, requests: pd.DataFrame) -> None:
    """Say on stderr, once for each system, how many requests it refuses at arrival, and why the first."""
    refused = requests[requests.refusal != ""].drop_duplicates("request_id")
    if len(refused):
        said = f"{system.name} refuses {len(refused)} of {requests.request_id.nunique()} requests"
        tell_once(f"refused {system.name}", f"{said}; the first: {refused.refusal.iloc[0]}")
