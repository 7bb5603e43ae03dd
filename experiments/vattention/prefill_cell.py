"""Prefills of one prompt at a time: on real memory, every system in turn, or as a device model prices them.

A sample is one prefill: seconds of the step, of attention in it, and of what the allocator held up. Memory is what a
server finds that has been running for a while: a prompt takes the place of one as long, so rows are inherited.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pandas as pd

from kvarena.allocators.policy import Admission, Policy
from kvarena.errors import UserError
from kvarena.experiments.kit.same_logits import check_same_logits
from kvarena.harness.engine.serving import Serving
from kvarena.harness.modelled.step_model import PS_PER_S, StepLoad
from kvarena.harness.record.record import Frames
from kvarena.harness.requests.request import Request
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System

if TYPE_CHECKING:  # a modelled run needs no torch
    from torch import Tensor

    from kvarena.harness.model.contract import Model


@dataclass
class Params:
    """`params.*` of conf/experiment/prefill_throughput.yaml; null there means: by the profile."""

    contexts: list[int] = field(default_factory=list)  # prompt lengths, tokens
    rounds: int = 0  # measured clock: interleaved repetitions, the samples of every interval
    models: dict[str, int] = field(default_factory=dict)  # modelled clock: name -> tensor-parallel degree
    pool_bytes: int | None = None


def modelled_cell(run: Run[Params]) -> Frames:
    """Every system at every length, as the engine prices it."""
    return {"samples": pd.DataFrame([_priced(run, s, n) for s in run.systems for n in run.params.contexts])}


def _priced(run: Run[Params], system: System, tokens: int) -> dict[str, object]:
    serving = Serving(run, system, context=tokens + 1)
    policy, prices, model = serving.policy, serving.prices, serving.step_model
    _take(policy, 0, tokens)
    first_ps = prices.total_ps(policy.drain())
    policy.look_ahead()  # beside the first prompt's step
    policy.release(0)
    _take(policy, 1, tokens)
    mapping_ps = prices.total_ps(policy.drain())
    pairs = tokens * (tokens + 1) // 2
    step_ps = model.step_ps(StepLoad(tokens, 0, 0, pairs))
    return {
        "system": system.name, "context": tokens, "round": 0, "prefill_s": (step_ps + mapping_ps) / PS_PER_S,
        "attention_s": model.pair_ps * pairs / PS_PER_S, "mapping_s": mapping_ps / PS_PER_S,
        "first_mapping_s": first_ps / PS_PER_S,
    }  # fmt: skip


def _take(policy: Policy, seq_id: int, tokens: int) -> None:
    if policy.admit(Admission([Request(seq_id, tokens, 1)], tokens)) is None:
        raise UserError(f"{policy.name}: a prompt of {tokens} tokens does not fit the pool; see params.contexts")


def measured_cell(run: Run[Params]) -> Frames:
    """Rounds over lengths and systems; the first round warms up, and there every system's logits must agree."""
    from kvarena.harness.model.build import build_model

    model = build_model(run.model, run.device.kind)
    samples = []
    with ExitStack() as stack:
        lanes = {system.name: stack.enter_context(_Lane(run, system, model)) for system in run.systems}
        for number in range(-1, run.params.rounds):
            for tokens in run.params.contexts:
                turn = list(lanes.items())
                turn = turn[number % len(turn) :] + turn[: number % len(turn)]  # nobody always follows the same one
                taken = [{"system": name, "round": number, **lane.prefill(tokens)} for name, lane in turn]
                if number < 0:
                    logits = {name: lane.logits for name, lane in turn}
                    check_same_logits(logits, run.model.dtype, f"a prompt of {tokens} tokens")
                else:
                    samples += taken
    return {"samples": pd.DataFrame(samples)}


class _Lane:
    """One system, serving one prompt at a time."""

    def __init__(self, run: Run[Params], system: System, model: "Model") -> None:
        longest = max(run.params.contexts) + 1
        pool_bytes = run.params.pool_bytes or 2 * model.config.kv_layout().resident_bytes(longest)
        self._serving = Serving(run, system, pool_bytes=pool_bytes, context=longest, model=model)
        self._scheduler, self._executor = self._serving.scheduler, self._serving.torch_executor
        self._ids = iter(range(1 << 30))

    def __enter__(self) -> "_Lane":
        return self

    def __exit__(self, *_: object) -> None:
        self._serving.close()

    @property
    def logits(self) -> "Tensor":
        """Of the last prompt's next token."""
        assert self._executor.logits is not None, "a prompt was served"
        return self._executor.logits

    def prefill(self, tokens: int) -> dict[str, float]:
        """Serve a prompt in one step; every lane draws the same tokens for its n-th prompt."""
        self._scheduler.submit(Request(next(self._ids), tokens, 1))
        plan = self._scheduler.schedule(now_ps=0)
        time = self._executor.execute(plan)
        self._scheduler.complete(plan, now_ps=time.duration_ps)
        for request in self._scheduler.finished:
            self._executor.finish(request)
        phases = self._executor.phases
        attention_s = phases["attention"] if self._executor.queue_full else math.nan  # else the host's time is in it
        return {"context": tokens, "prefill_s": time.duration_ps / PS_PER_S, "attention_s": attention_s,
                "mapping_s": phases["actions"]}  # fmt: skip


def shown(samples: pd.DataFrame, system: str) -> Iterator[tuple[int, pd.DataFrame]]:
    """The samples of one system by length, rounds in order."""
    for tokens, rows in samples[samples.system == system].groupby("context"):
        yield int(str(tokens)), rows.sort_values("round")
