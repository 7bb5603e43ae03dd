"""Replays: a workload served by the systems of a run, under either clock.

trace + arrivals -> Workload -> Requests -> Engine -> what happened to each request, and in each step
"""

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from kvarena.errors import UserError
from kvarena.harness.accounts.refusals import Refusals
from kvarena.harness.accounts.told import tell
from kvarena.harness.config import load, typed
from kvarena.harness.decoding.mix import decodings
from kvarena.harness.engine.engine import Engine
from kvarena.harness.engine.serving import Serving
from kvarena.harness.record.metrics import once_each
from kvarena.harness.requests.decoding import GREEDY, DecodingConfig
from kvarena.harness.requests.prefix import Prefix
from kvarena.harness.requests.request import Request
from kvarena.harness.requests.request_list import check_width, make_requests
from kvarena.harness.requests.request_log import request_frame
from kvarena.harness.requests.workload import Workload, make_workload
from kvarena.harness.run.published import named
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System
from kvarena.harness.trace.config import TraceConfig
from kvarena.harness.trace.file_arrivals import ASKED, RATES

if TYPE_CHECKING:  # a modelled replay needs no torch, which is half of what the process would hold
    from kvarena.harness.model.contract import Model


def trace_named(run: Run[object], name: str, path: str | None = None) -> TraceConfig:
    """The run's own trace where it has that name, else conf/trace/<name>.yaml; read from `path` where there is one."""
    own: TraceConfig = run.trace if run.trace.name == name else typed(TraceConfig, load("trace", name), "trace")
    return replace(own, path=path or own.path)


def workload_of(
    run: Run[object],
    trace: TraceConfig | None = None,
    seed: int | None = None,
    rate: float | None = None,
    duration_s: float | None = None,
) -> Workload:
    """The run's workload, or that of another trace or seed, with arrivals at another rate (requests/s) or for longer.

    A trace that a table draws and its arrivals both follow the seed. What becomes of the trace is told: what is made
    here is served. `example_of` makes one that is not.
    """
    workload = example_of(run, trace, seed, rate, duration_s)
    assert workload.account is not None, "a workload that is made from a trace has its account"
    tell(workload.account)
    return workload


def example_of(
    run: Run[object],
    trace: TraceConfig | None = None,
    seed: int | None = None,
    rate: float | None = None,
    duration_s: float | None = None,
) -> Workload:
    """A workload like those of `workload_of`, for notes that describe them: it counts as no replay."""
    trace, arrivals = trace or run.trace, run.arrival
    if rate is not None:
        arrivals = replace(arrivals, rate=rate)
    if duration_s is not None:
        arrivals = replace(arrivals, duration_s=duration_s)
    if seed is not None:
        trace, arrivals = replace(trace, seed=seed), replace(arrivals, seed=seed)
    chosen = RATES if rate is not None and run.arrival_chosen != ASKED else run.arrival_chosen
    return make_workload(trace, arrivals, run.context, chosen)


def requests_of(
    workload: Workload,
    run: Run[object] | None = None,
    decoding: DecodingConfig | None = None,
    prefix: Prefix | None = None,
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

    `jump=False` has the log of a modelled replay keep every iteration by itself; `sharing`: requests are of several
    sequences, or share a prefix, whatever the run says of decoding.
    """

    def __init__(self, run: Run[object], *, jump: bool = True, sharing: bool = False) -> None:
        """Raises UserError for a system of the run that cannot serve here at all: before any of them is replayed."""
        self._run, self._jump = run, jump
        sharing = sharing or run.decoding.n > 1 or not {"n1"}.issuperset(run.trace.mix or ())
        for system in run.systems:
            serving = Serving(run, system)
            _ = serving.scheduler
            if sharing and serving.policy.sharing is None:
                raise UserError(f"systems: {system.name} serves no requests of several sequences, and shares no prefix")
            if run.clock == "modelled":
                _ = serving.step_model
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
        check_served(self._run, system, served.requests)
        return served

    def _serve(
        self,
        system: System,
        workload: Workload,
        decoding: DecodingConfig | None = None,
        prefix: Prefix | None = None,
        share_prefix: bool = True,
    ) -> Served:
        run, kept = self._run, [prefix] if prefix is not None and share_prefix else []
        with Serving(run, system, model=self._model) as serving:
            engine = Engine(serving.scheduler, serving.executor, jump=self._jump, prefixes=kept)
            done = engine.run(requests_of(workload, run, decoding, prefix))
        requests, steps = request_frame(done.requests), done.steps.to_frame()
        return Served(requests.assign(system=system.name), steps.assign(system=system.name), done.resumed_gaps_ps)

    def _warm_up(self, system: System, workload: Workload) -> None:
        kind = (system.allocator.name, system.kernel.name)
        if kind not in self._warm:
            self._warm.add(kind)
            prompts, outputs = workload.prompt_tokens[:2], workload.output_tokens[:2].clip(max=4)
            self._serve(system, Workload(prompts, outputs, workload.arrival_ps[:2] * 0))

    @cached_property
    def _model(self) -> "Model | None":
        """One for all systems; under the modelled clock none is run."""
        if self._run.clock == "modelled":
            return None
        from kvarena.harness.model.build import build_model

        return build_model(self._run.model, self._run.device.kind)


def check_served(run: Run[object], system: System, requests: pd.DataFrame) -> None:
    """Tell how many requests a system refused at arrival in one replay. Raises UserError where it refuses all."""
    arrived = once_each(requests)
    reasons = arrived.refusal[arrived.refusal != ""]
    first = next(iter(reasons), "")
    if 0 < len(arrived) == len(reasons):
        raise UserError(
            f"{system.name} refuses all {len(arrived)} requests; {first}; a larger pool (params.pool_bytes), or a list "
            "of systems=[...] without it"
        )
    tell_refusals(run, system, len(arrived), len(reasons), first)


def tell_refusals(run: Run[object], system: System, arrived: int, refused: int, first: str, way: str = "") -> None:
    """Tell how many of the requests that arrived a system refused, none too. way: in which it is run, of several."""
    names = named(run, system, counted=True)
    said = {key: str(names[key]) for key in ("setup", "allocator", "kernel", "model")}
    tell(Refusals(**said, label=f"{names['label']}{way}", requests=arrived, refused=refused, first=first))
