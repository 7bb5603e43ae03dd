"""`decode_throughput` under the modelled clock, at the scale of vAttention's Fig 8 and Table 7.

Every sequence is resident from the start, as in the paper's measurement. The policies decide each step as they would
for real, so that what they map, and whether the device hides it, is in the step's time.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pandas as pd

from kvarena.allocators.policy import Policy
from kvarena.errors import UserError
from kvarena.experiments.kit.published_models import by_model, of_model, runs_by_model
from kvarena.harness.engine.resident import make_resident
from kvarena.harness.engine.serving import Serving, pool_bytes_of
from kvarena.harness.modelled.step_model import PS_PER_S
from kvarena.harness.record.progress import Progress
from kvarena.harness.record.record import Frames, Measured, Recorder
from kvarena.harness.record.summary import Names, SummaryRow, row
from kvarena.harness.requests.request import Request, RequestState
from kvarena.harness.run.published import named
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System


@dataclass
class Params:
    """`params.*` of conf/experiment/decode_throughput.yaml; null there means: by the profile of the device."""

    batch_sizes: list[int] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)  # "trace": the trace's; a number: that many tokens, as in Fig 8
    max_tokens: int = 0  # measured clock: longest sequence, the row of a static allocator
    pool_bytes: int | None = None  # of every allocator; null: batch x max_tokens, what static reservation needs
    warmup_steps: int = 0
    check_steps: int = 0  # steps whose logits are compared between the systems before anything is timed
    rounds: int = 0  # interleaved repetitions, the samples of every interval; at least 6 give 95 %
    steps_per_round: int = 0
    models: dict[str, int] = field(default_factory=dict)  # modelled clock: name -> tensor-parallel degree

    @property
    def steps(self) -> int:
        """Tokens that every sequence decodes."""
        return self.warmup_steps + self.check_steps + self.rounds * self.steps_per_round


NAME = "decode_throughput"
HEADLINE = "decode_throughput_vs_batch"
TRACE = "trace"  # of `params.prompts`: those of the trace


def measure(run: Run[Params], recorder: Recorder) -> Measured:
    """Every model, prompt length, system and batch size that fits the device."""
    lengths = _lengths(run)
    points: list[pd.DataFrame] = []
    left_out: list[str] = []
    runs = runs_by_model(run, run.params.models)
    with Progress(NAME, len(runs) * len(lengths)) as progress:
        for one, context in itertools.product(runs, lengths):
            progress.stage(f"{one.model.name}, {context} tokens")
            batches = [b for b in run.params.batch_sizes if _fits(one, b, context)]
            left_out += [f"{one.model.name} at {b} x {context}" for b in run.params.batch_sizes if b not in batches]
            if batches:
                cell = recorder.cell(f"{one.model.name}-{context}", partial(_cell, one, batches, context))
                points.append(of_model(one, cell["points"]))
            progress.advance()
    if not points:
        raise UserError(
            f"params.batch_sizes={run.params.batch_sizes}: none has room in the pool: {', '.join(left_out)}"
        )
    return Measured({"points": pd.concat(points, ignore_index=True)}, {"no_room_for": left_out})


def _lengths(run: Run[Params]) -> list[int]:
    """Tokens of each prompt. Raises UserError for prompts of a trace."""
    for kind in run.params.prompts:
        if not kind.isdecimal() or int(kind) < 1:
            raise UserError(f"params.prompts={kind}: clock=modelled takes a number of tokens, the same for all")
    return [int(kind) for kind in run.params.prompts]


def _fits(run: Run[Params], batch: int, context: int) -> bool:
    """Whether the K/V of the whole decode fits every system's pool."""
    tokens = context + run.params.steps + 1
    needed = batch * run.model.shard().kv_layout().resident_bytes(tokens)
    return all(needed <= pool_bytes_of(run, system) for system in run.systems)


def _cell(run: Run[Params], batches: list[int], context: int) -> Frames:
    records = [
        {"prompts": str(context), "system": system.name, "batch": batch, **_decode(run, system, batch, context)}
        for system in run.systems
        for batch in batches
    ]
    return {"points": pd.DataFrame(records)}


def _decode(run: Run[Params], system: System, batch: int, context: int) -> dict[str, float]:
    """Mean times of a step, in seconds, over `params.steps` steps; driver calls, and what they held up."""
    steps = run.params.steps
    serving = Serving(run, system, context=context + steps + 2)
    scheduler, executor = serving.scheduler, serving.executor
    scheduler.running = _residents(serving.policy, batch, context, steps)
    duration_ps = stall_ps = mapped = 0
    for _ in range(steps):
        plan = scheduler.schedule(now_ps=0)
        if len(plan.decodes) < batch:
            raise UserError(f"{system.name}: a batch of {batch} outgrows the pool of {run.model.name}")
        time = executor.execute(plan)
        scheduler.complete(plan, now_ps=0)
        duration_ps, stall_ps = duration_ps + time.duration_ps, stall_ps + time.stall_ps
        mapped += len(plan.actions) + len(plan.ahead)
    context_tokens = batch * (context + (steps + 1) / 2)  # of the mean step, the written ones included
    return {
        "step_s": duration_ps / steps / PS_PER_S,
        "stall_s": stall_ps / steps / PS_PER_S,
        "attention_s": serving.step_model.context_ps * context_tokens / PS_PER_S,
        "actions": mapped / steps,
    }


def _residents(policy: Policy, batch: int, context: int, steps: int) -> list[Request]:
    """Sequences whose prompts are cached and which have a token each, admitted and not yet decoding."""
    requests = [
        Request(seq_id, context, steps + 2, state=RequestState.RUNNING, computed=context, generated=1)
        for seq_id in range(batch)
    ]
    make_resident(policy, requests)
    return requests


def rows(run: Run[Params], points: pd.DataFrame) -> Iterator[SummaryRow]:
    """Fig 8 and Table 7; and what the allocator took of a step."""
    systems = {system.name: system for system in run.systems}
    for one, table in by_model(run, points):
        for point in table.itertuples():
            yield from _rows(one, systems[str(point.system)], point)


def _rows(run: Run[Params], system: System, point: Any) -> Iterator[SummaryRow]:
    for figure, quantity, value, unit in (
        ("fig8", HEADLINE, point.batch / point.step_s, "tok/s"),
        ("table7", "decode_attention_time_vs_batch", 1e3 * point.attention_s, "ms"),
        (None, "step_time_vs_batch", 1e3 * point.step_s, "ms"),
        (None, "attention_share_of_step", 100 * point.attention_s / point.step_s, "%"),
        (None, "allocator_stall_vs_batch", 1e6 * point.stall_s, "us"),
        (None, "actions_per_step_vs_batch", point.actions, "count"),
    ):
        yield row(value, quantity=quantity, unit=unit, **named_at(run, system, point.prompts, figure, x=point.batch))


def named_at(
    run: Run[Params], system: System, prompts: str, figure: str | None = None, *, x: float, counted: bool = False
) -> Names:
    """What a row is called. `prompts` of `params.prompts`: the trace's, or so many tokens each as in Fig 8."""
    if prompts == TRACE:
        return named(run, system, figure, x=x, counted=counted)
    alike = replace(run, reads=tuple(group for group in run.reads if group != "trace"))
    return named(
        alike, system, figure, detail=f"{prompts} tokens", x=x, counted=counted,
        prompt_tokens=int(prompts), decoded_tokens=run.params.steps,
    )  # fmt: skip
