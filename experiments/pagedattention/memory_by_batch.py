"""Memory and throughput by batch size (PagedAttention Fig 1, right), by system.

Memory follows from lengths alone. A system is asked what it attaches to one sequence at every length; the trace says
how often a running request has that length. Measured, the same is read off the steps of a replay.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd

from kvarena.allocators.policy import Admission, Sequence
from kvarena.allocators.usage import Usage
from kvarena.errors import UserError
from kvarena.harness.engine.serving import Serving
from kvarena.harness.modelled.step_model import PS_PER_S, StepLoad
from kvarena.harness.record.record import Frames
from kvarena.harness.record.summary import Names, SummaryRow, row
from kvarena.harness.requests.workload import Workload
from kvarena.harness.run.published import named
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System
from kvarena.harness.trace.trace import Ints

GB = 10**9
FIGURE = "fig1"
EXISTING, VLLM = "Existing systems", "vLLM"  # as Fig 1 calls what reserves the longest sequence, and what does not
ATTACHED = ("live", "reserved", "over_estimate", "rounding")


class Batches(NamedTuple):
    """x of Fig 1: batches whose memory is drawn, of systems that reserve and of those that do not; and throughput."""

    reserving: list[float]
    on_demand: list[float]
    throughput: list[float]


def frames(run: Run[object], workload: Workload, batches: Batches) -> Frames:
    """Modelled: `memory_by_batch` of every system, and `throughput_by_batch` of those with blocks on demand."""
    occurrences = running_lengths(workload)
    mean_tokens = _mean(np.arange(len(occurrences)), occurrences)
    memory, throughput = list[dict[str, object]](), list[dict[str, object]]()
    for system in run.systems:
        attached = attached_bytes(run, system, len(occurrences) - 1)
        reserves, per_request = bool(attached[1] == attached[-1]), _mean(attached, occurrences)
        for batch in batches.reserving if reserves else batches.on_demand:
            value = run.model.weight_bytes + batch * per_request
            memory.append({"system": system.name, "batch": float(batch), "bytes": value, "reserves": reserves,
                           "bytes_per_request": per_request})  # fmt: skip
        if system.allocator.name == "paged":
            throughput += _throughput(run, system, mean_tokens, batches.throughput)
    tables = {"memory_by_batch": memory, "throughput_by_batch": throughput}
    return {name: pd.DataFrame(table) for name, table in tables.items() if table}


def _mean(values: Ints, occurrences: Ints) -> float:
    return float((values * occurrences).sum() / occurrences.sum())


def _throughput(
    run: Run[object], system: System, mean_tokens: float, batches: list[float]
) -> Iterator[dict[str, object]]:
    model = Serving(run, system).step_model
    for batch in batches:
        step_ps = model.step_ps(StepLoad(int(batch), int(batch), round(batch * mean_tokens)))
        yield {"system": system.name, "batch": float(batch), "tokens_per_s": batch / step_ps * PS_PER_S}


def modelled(run: Run[object], frames: Frames) -> Iterator[SummaryRow]:
    """Memory of every system, and throughput, at the lengths that a running request has."""
    throughput = frames.get("throughput_by_batch", pd.DataFrame(columns=["system", "batch", "tokens_per_s"]))
    for system in run.systems:
        memory = frames["memory_by_batch"]
        own = memory[memory.system == system.name]
        reserves = bool(own.reserves.iloc[0])
        for batch, held in zip(own.batch.tolist(), own.bytes.tolist(), strict=True):
            key = EXISTING if reserves else VLLM
            names = named(run, system, FIGURE, key=key, x=batch, counted=reserves, half="memory")
            yield row(held / GB, quantity="memory_vs_batch", unit="GB", **names)
        yield _per_request(named(run, system, counted=reserves), own.bytes_per_request.iloc[0])
        points = throughput[throughput.system == system.name]
        for batch, rate in zip(points.batch.tolist(), points.tokens_per_s.tolist(), strict=True):
            names = named(run, system, FIGURE, key=VLLM, x=batch, half="throughput")
            yield row(rate, quantity="throughput_vs_batch", unit="token/s", **names)


def _per_request(names: Names, value: float) -> SummaryRow:
    return row(value / GB, quantity="memory_per_running_request", unit="GB", **names)


def running_lengths(workload: Workload) -> Ints:
    """How often a request that runs has each length, over all their steps: [longest + 1], index = tokens.

    A request of p prompt and n output tokens takes n steps, in which it has p, p + 1, ..., p + n - 1 tokens.
    """
    final = workload.prompt_tokens + workload.output_tokens
    begins = np.bincount(workload.prompt_tokens, minlength=int(final.max()) + 1)
    occurrences: Ints = np.cumsum(begins - np.bincount(final))[:-1]
    return occurrences


def attached_bytes(run: Run[object], system: System, longest: int) -> Ints:
    """Bytes that a system's policy attaches to one sequence, alone, by its length, on all devices: [longest + 1].

    Raises UserError where the pool does not hold one.
    """
    policy = Serving(run, system).policy
    if policy.admit(Admission([Sequence(0, 1, run.context - 1)], 1)) is None:
        raise UserError(f"params.pool_bytes: {policy.name} cannot hold one sequence")
    attached = [0, _attached(policy.usage())]
    for _ in range(longest - 1):
        policy.grow(0)
        attached.append(_attached(policy.usage()))
    return run.model.tp * np.array(attached, np.int64)


def _attached(usage: Usage) -> int:
    return sum(int(getattr(usage, leaf)) for leaf in ATTACHED)


def measured(run: Run[object], steps: pd.DataFrame) -> Iterator[SummaryRow]:
    """The same of this machine, from the steps that only decode."""
    decoding = steps[(steps.prefills == 0) & (steps.decodes > 0)]
    decoding = decoding.assign(attached=decoding[list(ATTACHED)].sum(axis=1))
    for system in run.systems:
        own = decoding[decoding.system == system.name]
        for batch, rows in own.groupby("requests"):
            names = named(run, system, x=float(batch))  # type: ignore[arg-type]
            value = (run.model.weight_bytes + rows.attached.sum() / rows.steps.sum()) / GB
            yield row(value, quantity="memory_vs_batch", unit="GB", **names)
            value = PS_PER_S / float((rows.duration_ps / (rows.steps * rows.output_tokens)).median())
            yield row(value, quantity="throughput_vs_batch", unit="token/s", **names)
        if len(own):
            yield _per_request(named(run, system), own.attached.sum() / (own.requests * own.steps).sum())
