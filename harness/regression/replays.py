"""The exact tier's suite: seeded replays under the modelled clock, and what is counted of them.

conf/regression.yaml lists them. Every number is an integer, or a share of integers printed to six digits; arrivals,
lengths and step times are integers too, so that a count is the same on every machine and under every Python.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from kvarena.allocators.policy import Policy
from kvarena.allocators.registry import make_policy
from kvarena.allocators.usage import LEAVES
from kvarena.harness.config import load, typed
from kvarena.harness.engine.engine import Engine, Replay
from kvarena.harness.modelled.action_prices import action_prices
from kvarena.harness.modelled.roofline import step_model_of
from kvarena.harness.paths import CONF
from kvarena.harness.regression.counting import CountingExecutor, Takes, counted_takes
from kvarena.harness.requests.decoding import DecodingConfig
from kvarena.harness.requests.request import Request, RequestState
from kvarena.harness.requests.request_list import make_requests
from kvarena.harness.requests.workload import make_workload
from kvarena.harness.run import schemas
from kvarena.harness.scheduler.registry import make_scheduler
from kvarena.harness.trace.arrival import ArrivalConfig

BLOCK_TOKENS = 16  # of the blocks in which an engine's pool is counted

Counts = dict[str, str]  # quantity -> value, as it is written


class Scenario:
    """One workload on one modelled device, and the systems that serve it."""

    def __init__(self, config: DictConfig) -> None:
        self._config = config
        self.systems = [str(system) for system in config.systems]
        self._model = _typed("model", config.model)
        self._device = _typed("device", config.device)
        # Any scheduler will do: what is counted says nothing of the engine that it was fitted to.
        self._engine = replace(_typed("engine", config.engine), schedulers=[])
        self._context = min(self._model.max_tokens, config.trace.get("max_tokens") or self._model.max_tokens)

    def replay(self, system: str) -> Counts:
        """Serve the workload to its end, and count."""
        parts = self._config.systems[system]
        policy = make_policy(
            _typed("allocator", parts.allocator.name, parts.allocator),
            self._model.kv_layout(),
            self._pool_bytes(parts.scheduler.name),
            self._context,
        )
        scheduler = make_scheduler(_typed("scheduler", parts.scheduler.name, parts.scheduler), policy, self._context)
        step_model = step_model_of(self._device, self._engine, self._model, parts.scheduler.name, attention=None)
        executor = CountingExecutor(step_model, action_prices(self._device, policy))
        with counted_takes() as takes:
            done = Engine(scheduler, executor).run(self._requests())
        return _counts(done, executor, takes, policy)

    def _requests(self) -> list[Request]:
        trace = replace(_typed("trace", self._config.trace.name, self._config.trace), seed=0)
        workload = make_workload(trace, ArrivalConfig("poisson", rate=self._config.rate, seed=0), self._context)
        decoding = DecodingConfig(**self._config.get("decoding", {}))
        return make_requests(workload, [decoding] * len(workload))

    def _pool_bytes(self, scheduler: str) -> int:
        if given := self._config.get("pool_bytes"):
            return int(given)
        blocks = self._engine.constants(self._model.name, scheduler).kv_blocks
        return int(blocks * BLOCK_TOKENS * self._model.kv_layout().token_bytes)


def run_all() -> Iterator[tuple[str, Counts]]:
    """Every replay of the suite: (`<workload>/<system>`, its counts)."""
    suite = OmegaConf.load(CONF / "regression.yaml")
    assert isinstance(suite, DictConfig)
    for name in map(str, suite):
        scenario = Scenario(suite[name])
        for system in scenario.systems:
            yield f"{name}/{system}", scenario.replay(system)


def _typed(group: str, name: str, given: DictConfig | None = None) -> Any:
    """A file of conf/<group>/ as its dataclass, with what the suite sets of it."""
    return typed(schemas.of(group, name), OmegaConf.merge(load(group, name), given or {}), f"regression.yaml: {group}")


def _counts(done: Replay, executor: CountingExecutor, takes: Takes, policy: Policy) -> Counts:
    steps, finished = done.steps.to_frame(), [r for r in done.requests if r.state is RequestState.FINISHED]
    integers = {
        "finished": len(finished),
        "steps": steps.steps.sum(),
        "admissions": executor.admissions,
        "preemptions": steps.preempted.sum(),
        "swap_outs": steps.swapped_out.sum(),
        "peak_batch": (steps.decodes + steps.prefills).max(),
        "allocations": takes.units,
        "peak_units": takes.peak,
        "maps": executor.actions["Map"],
        "unmaps": executor.actions["Unmap"],
        "copies": executor.actions["CopyBlock"] + executor.actions["CopyRow"],
        "swapped_blocks": executor.actions["SwapOut"] + executor.actions["SwapIn"],
        "stall_ps": steps.stall_ps.sum(),
        "makespan_ps": max(r.finish_ps for r in finished if r.finish_ps) - min(r.arrival_ps for r in done.requests),
    }
    return {name: str(int(value)) for name, value in integers.items()} | _shares(steps, policy.pool_bytes)


def _shares(steps: pd.DataFrame, pool_bytes: int) -> Counts:
    """Mean share of the pool over iterations, by leaf, in percent."""
    whole = int(steps.steps.sum()) * pool_bytes
    return {f"{leaf}_pct": f"{100 * int(steps[leaf].sum()) / whole:.6f}" for leaf in LEAVES}
