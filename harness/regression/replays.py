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
from kvarena.allocators.usage import LEAVES
from kvarena.harness.config import load, typed
from kvarena.harness.engine.engine import Engine, Replay
from kvarena.harness.engine.serving import Serving
from kvarena.harness.paths import CONF
from kvarena.harness.regression.counting import PlanCounts, Takes, counted_takes
from kvarena.harness.requests.decoding import DecodingConfig
from kvarena.harness.requests.request import Request, RequestState
from kvarena.harness.requests.request_list import make_requests
from kvarena.harness.requests.workload import make_workload
from kvarena.harness.run import schemas
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System
from kvarena.harness.trace.arrival import ArrivalConfig
from kvarena.kernels.config import KernelConfig

NO_KERNEL = KernelConfig("none")  # the suite's engines tell none apart

Counts = dict[str, str]  # quantity -> value, as it is written


class Scenario:
    """One workload on one modelled device, and the systems that serve it."""

    def __init__(self, config: DictConfig) -> None:
        self._config = config
        self.systems = [str(system) for system in config.systems]
        self._run = Run(
            experiment="regression",
            clock="modelled",
            device=_typed("device", config.device),
            model=_typed("model", config.model),
            trace=replace(_typed("trace", config.trace.name, config.trace), seed=0),
            arrival=ArrivalConfig("poisson", rate=config.rate, seed=0),
            # Any scheduler will do: what is counted says nothing of the engine that it was fitted to.
            engine=replace(_typed("engine", config.engine), schedulers=[]),
            systems=(),
            params=None,
            decoding=DecodingConfig(**config.get("decoding", {})),
        )

    def replay(self, system: str) -> Counts:
        """Serve the workload to its end, and count."""
        with Serving(self._run, self._system(system), pool_bytes=self._config.get("pool_bytes")) as serving:
            counts = PlanCounts()
            engine = Engine(serving.scheduler, serving.executor, watch=counts)
            with counted_takes() as takes:
                done = engine.run(self._requests())
            return _counts(done, counts, takes, serving.policy)

    def _system(self, name: str) -> System:
        parts = self._config.systems[name]
        allocator, scheduler = (_typed(g, parts[g].name, parts[g]) for g in ("allocator", "scheduler"))
        return System(name, allocator, NO_KERNEL, scheduler, "-")

    def _requests(self) -> list[Request]:
        workload = make_workload(self._run.trace, self._run.arrival, self._run.context)
        return make_requests(workload, [self._run.decoding] * len(workload))


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


def _counts(done: Replay, counts: PlanCounts, takes: Takes, policy: Policy) -> Counts:
    steps, finished = done.steps.to_frame(), [r for r in done.requests if r.state is RequestState.FINISHED]
    integers = {
        "finished": len(finished),
        "steps": steps.steps.sum(),
        "admissions": counts.admissions,
        "preemptions": steps.preempted.sum(),
        "swap_outs": steps.swapped_out.sum(),
        "peak_batch": (steps.decodes + steps.prefills).max(),
        "allocations": takes.units,
        "peak_units": takes.peak,
        "maps": counts.actions["Map"],
        "unmaps": counts.actions["Unmap"],
        "copies": counts.actions["CopyBlock"] + counts.actions["CopyRow"],
        "swapped_blocks": counts.actions["SwapOut"] + counts.actions["SwapIn"],
        "stall_ps": steps.stall_ps.sum(),
        "makespan_ps": max(r.finish_ps for r in finished if r.finish_ps) - min(r.arrival_ps for r in done.requests),
    }
    return {name: str(int(value)) for name, value in integers.items()} | _shares(steps, policy.pool_bytes)


def _shares(steps: pd.DataFrame, pool_bytes: int) -> Counts:
    """Mean share of the pool over iterations, by leaf, in percent."""
    whole = int(steps.steps.sum()) * pool_bytes
    return {f"{leaf}_pct": f"{100 * int(steps[leaf].sum()) / whole:.6f}" for leaf in LEAVES}
