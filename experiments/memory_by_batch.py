"""Memory and throughput by batch size (PagedAttention Fig 1, right), by system.

Memory follows from lengths alone. A system is asked what it attaches to one sequence at every length; the trace says
how often a running request has that length. Measured, the same is read off the steps of a replay.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from kvarena.allocators.policy import Sequence
from kvarena.allocators.registry import make_policy
from kvarena.allocators.usage import Usage
from kvarena.errors import UserError
from kvarena.experiments.replay import columns, context_of, pool_bytes_of
from kvarena.harness.roofline import make_step_model
from kvarena.harness.run import Run
from kvarena.harness.step_model import PS_PER_S, StepLoad
from kvarena.harness.summary import SummaryRow, row
from kvarena.harness.systems import System
from kvarena.harness.trace.trace import Ints
from kvarena.harness.workload import Workload

NAME = "memory_layout"
GB = 10**9
FIG1_MODEL = "opt-13b"  # "13B LLM" there; another model does not wear the paper's panel
FIG1_NAMES = {"orca_max": "Existing systems"}  # as Fig 1 calls what reserves the longest sequence
ATTACHED = ("live", "reserved", "over_estimate", "rounding")


def layout_row(run: Run, value: float, **given: Any) -> SummaryRow:
    """A row of `memory_layout`; `given` overrides what most rows share."""
    shared = {"experiment": NAME, "paper": "pagedattention", "allocator": "-", "kernel": "-", "model": run.model.name,
              "clock": run.clock, "device": run.device_name, "evidence": "exact"}  # fmt: skip
    return row(value, **{**shared, **given})


def modelled(run: Run, workload: Workload) -> Iterator[SummaryRow]:
    """Memory of every system, and throughput, at the lengths that a running request has."""
    occurrences = running_lengths(workload)
    mean_tokens = _mean(np.arange(len(occurrences)), occurrences)
    for system in run.systems:
        attached = attached_bytes(run, system, len(occurrences) - 1)
        reserves = attached[1] == attached[-1]
        names = {**columns(run, system), "evidence": "exact" if reserves else "predicted"}
        if run.imitates:
            names["system"] = FIG1_NAMES.get(system.allocator.name, names["system"])
        per_request = _mean(attached, occurrences)
        for batch in run.params.reserving_batches if reserves else run.params.on_demand_batches:
            value = (run.model.weight_bytes + batch * per_request) / GB
            place = _place(run, "memory") | {"quantity": "memory_vs_batch", "x": batch, "unit": "GB"}
            yield layout_row(run, value, **place, **names)
        yield _per_request(run, per_request, names)
        if system.allocator.name == "paged":
            yield from _throughput(run, system, mean_tokens)


def _mean(values: Ints, occurrences: Ints) -> float:
    return float((values * occurrences).sum() / occurrences.sum())


def _place(run: Run, panel: str) -> dict[str, Any]:
    """The published panel for the model of Fig 1, else our own."""
    if run.clock == "modelled" and run.model.name == FIG1_MODEL:
        return {"paper": "pagedattention", "figure": "fig1", "panel": panel}
    return {"paper": "kvarena", "figure": NAME, "panel": f"{run.model.name} {panel}"}


def _per_request(run: Run, value: float, names: dict[str, str]) -> SummaryRow:
    place = _place(run, "memory") | {"paper": "kvarena", "figure": NAME}
    return layout_row(run, value / GB, quantity="memory_per_running_request", unit="GB", **place, **names)


def _throughput(run: Run, system: System, mean_tokens: float) -> Iterator[SummaryRow]:
    model = make_step_model(run.device, run.engine, run.model, system)
    place = _place(run, "throughput") | {"quantity": "throughput_vs_batch", "unit": "token/s"}
    for batch in run.params.throughput_batches:
        step_ps = model.step_ps(StepLoad(int(batch), int(batch), round(batch * mean_tokens)))
        value = batch / step_ps * PS_PER_S
        yield layout_row(run, value, x=batch, **place, **columns(run, system), evidence="predicted")


def running_lengths(workload: Workload) -> Ints:
    """How often a request that runs has each length, over all their steps: [longest + 1], index = tokens.

    A request of p prompt and n output tokens takes n steps, in which it has p, p + 1, ..., p + n - 1 tokens.
    """
    final = workload.prompt_tokens + workload.output_tokens
    begins = np.bincount(workload.prompt_tokens, minlength=int(final.max()) + 1)
    occurrences: Ints = np.cumsum(begins - np.bincount(final))[:-1]
    return occurrences


def attached_bytes(run: Run, system: System, longest: int) -> Ints:
    """Bytes that a system's policy attaches to one sequence, alone, by its length: [longest + 1].

    Raises UserError where the pool does not hold one.
    """
    policy = make_policy(system.allocator, run.model.kv_layout(), pool_bytes_of(run, system), context_of(run))
    if not policy.admit(Sequence(0, 1, context_of(run) - 1), 1):
        raise UserError(f"params.pool_bytes: {policy.name} cannot hold one sequence")
    attached = [0, _attached(policy.usage())]
    for _ in range(longest - 1):
        policy.grow(0)
        attached.append(_attached(policy.usage()))
    return np.array(attached, np.int64)


def _attached(usage: Usage) -> int:
    return sum(int(getattr(usage, leaf)) for leaf in ATTACHED)


def measured(run: Run, steps: pd.DataFrame) -> Iterator[SummaryRow]:
    """The same of this machine, from the steps that only decode."""
    decoding = steps[(steps.prefills == 0) & (steps.decodes > 0)]
    decoding = decoding.assign(attached=decoding[list(ATTACHED)].sum(axis=1))
    for system in run.systems:
        own = decoding[decoding.system == system.name]
        names = {**columns(run, system), "evidence": "measured"}
        for batch, rows in own.groupby("requests"):
            value = (run.model.weight_bytes + rows.attached.sum() / rows.steps.sum()) / GB
            place = _place(run, "memory") | {"quantity": "memory_vs_batch", "x": batch, "unit": "GB"}
            yield layout_row(run, value, **place, **names)
            value = PS_PER_S / float((rows.duration_ps / (rows.steps * rows.output_tokens)).median())
            place = _place(run, "throughput") | {"quantity": "throughput_vs_batch", "x": batch, "unit": "token/s"}
            yield layout_row(run, value, **place, **names)
        yield _per_request(run, own.attached.sum() / (own.requests * own.steps).sum(), names)
