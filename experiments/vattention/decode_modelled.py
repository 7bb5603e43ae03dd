"""`decode_throughput` under the modelled clock, at the scale of vAttention's Fig 8 and Table 7.

Every sequence is resident from the start, as in the paper's measurement. The policies decide each step as they would
for real, so that what they map, and whether the device hides it, is in the step's time.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import pandas as pd

from kvarena.allocators.options import with_options
from kvarena.allocators.policy import Policy
from kvarena.errors import UserError
from kvarena.experiments.kit.cells import Cell, run_cells
from kvarena.experiments.kit.published_models import by_model, model_columns, runs_by_model
from kvarena.experiments.kit.quantities import Quantity, rows
from kvarena.harness.engine.resident import make_resident
from kvarena.harness.engine.serving import Serving, pool_bytes_of
from kvarena.harness.modelled.step_model import PS_PER_S
from kvarena.harness.record.record import Frames, Measured, Recorder
from kvarena.harness.record.summary import Names, SummaryRow
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


HEADLINE = "decode_throughput_vs_batch"
TRACE = "trace"  # of `params.prompts`: those of the trace


def measure(run: Run[Params], recorder: Recorder) -> Measured:
    """Every model, prompt length, system and batch size that fits the device."""
    lengths, sizes = _lengths(run), run.params.batch_sizes
    cells, left_out = list[Cell](), list[str]()
    for one, context in itertools.product(runs_by_model(run, run.params.models), lengths):
        batches = [batch for batch in sizes if _fits(one, batch, context)]
        left_out += [f"{one.model.name} at {batch} x {context}" for batch in sizes if batch not in batches]
        if batches:
            measure_cell = partial(_cell, one, batches, context)
            cells.append(Cell(f"{one.model.name}-{context}", measure_cell, model_columns(one)))
    if not cells:
        raise UserError(f"params.batch_sizes={sizes}: none has room in the pool: {', '.join(left_out)}")
    return Measured(run_cells(run.experiment, recorder, cells), {"no_room_for": left_out})


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
    serving = Serving(run, without_watermark(system), context=context + steps + 2)
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


def without_watermark(system: System) -> System:
    """A watermark is for those who wait, and nobody does: a pool that holds the batch is enough."""
    return replace(system, allocator=with_options(system.allocator, watermark=0.0))


def _residents(policy: Policy, batch: int, context: int, steps: int) -> list[Request]:
    """Sequences whose prompts are cached and which have a token each, admitted and not yet decoding."""
    requests = [
        Request(seq_id, context, steps + 2, state=RequestState.RUNNING, computed=context, generated=1)
        for seq_id in range(batch)
    ]
    make_resident(policy, requests)
    return requests


QUANTITIES = (
    Quantity(HEADLINE, "tok/s", lambda point: point.batch / point.step_s, "fig8"),
    Quantity("decode_attention_time_vs_batch", "ms", lambda point: 1e3 * point.attention_s, "table7"),
    Quantity("step_time_vs_batch", "ms", lambda point: 1e3 * point.step_s),
    Quantity("attention_share_of_step", "%", lambda point: 100 * point.attention_s / point.step_s),
    Quantity("allocator_stall_vs_batch", "us", lambda point: 1e6 * point.stall_s),
    Quantity("actions_per_step_vs_batch", "count", "actions"),
)


def point_rows(run: Run[Params], points: pd.DataFrame) -> Iterator[SummaryRow]:
    """Fig 8 and Table 7; and what the allocator took of a step."""
    systems = {system.name: system for system in run.systems}
    for one, table in by_model(run, points):
        for (name, prompts, batch), point in table.groupby(["system", "prompts", "batch"], sort=False):
            names = partial(named_at, one, systems[str(name)], str(prompts), x=int(str(batch)))
            yield from rows(QUANTITIES, point, names)


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
