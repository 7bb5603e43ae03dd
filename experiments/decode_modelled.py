"""`decode_throughput` under the modelled clock, at the scale of vAttention's Fig 8 and Table 7.

Every sequence is resident from the start, as in the paper's measurement. The policies decide each step as they would
for real, so that what they map, and whether the device hides it, is in the step's time.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from kvarena.allocators.policy import Policy
from kvarena.allocators.registry import make_policy
from kvarena.errors import UserError
from kvarena.experiments import plots
from kvarena.experiments.published_models import runs_by_model
from kvarena.experiments.replay import columns, pool_bytes_of
from kvarena.harness.action_prices import action_prices
from kvarena.harness.model import panel_name
from kvarena.harness.modelled_executor import ModelledExecutor
from kvarena.harness.progress import Progress
from kvarena.harness.record import Frames, Outcome, Recorder
from kvarena.harness.request import Request, RequestState
from kvarena.harness.resident import make_resident
from kvarena.harness.roofline import make_step_model
from kvarena.harness.run import Run
from kvarena.harness.scheduler.registry import make_scheduler
from kvarena.harness.step_model import PS_PER_S
from kvarena.harness.summary import SummaryRow, frame, published_values, row
from kvarena.harness.systems import System

NAME = "decode_throughput"
HEADLINE = "decode_throughput_vs_batch"


def run_modelled(run: Run, recorder: Recorder) -> Outcome:
    """Every model, system and batch size that fits the device."""
    context = int(run.params.prompts[0])
    steps: list[pd.DataFrame] = []
    rows: list[SummaryRow] = []
    left_out: list[str] = []
    runs = runs_by_model(run)
    with Progress(NAME, len(runs)) as progress:
        for one in runs:
            progress.stage(one.model.name)
            batches = [b for b in run.params.batch_sizes if _fits(one, b, context)]
            left_out += [f"{one.model.name} at {b}: no room" for b in run.params.batch_sizes if b not in batches]
            table = recorder.cell(one.model.name, partial(_cell, one, batches, context))["steps"]
            steps.append(table)
            rows += _rows(one, table, context)
            progress.advance()
    summary = frame(rows)
    notes = {"context": context, "left_out": left_out}
    return Outcome(summary, pd.DataFrame(), pd.concat(steps, ignore_index=True), HEADLINE, draw(summary), notes)


def _fits(run: Run, batch: int, context: int) -> bool:
    """Whether the K/V of the whole decode fits every system's pool."""
    tokens = context + run.params.steps + 1
    needed = batch * run.model.shard().kv_layout().resident_bytes(tokens)
    return all(needed <= pool_bytes_of(run, system) for system in run.systems)


def _cell(run: Run, batches: list[int], context: int) -> Frames:
    records = [
        {"model": run.model.name, "system": system.name, "batch": batch, **_decode(run, system, batch, context)}
        for system in run.systems
        for batch in batches
    ]
    return {"steps": pd.DataFrame(records)}


def _decode(run: Run, system: System, batch: int, context: int) -> dict[str, float]:
    """Mean times of a step, in seconds, over `params.steps` steps; driver calls, and what they held up."""
    steps = run.params.steps
    max_tokens = context + steps + 2
    policy = make_policy(system.allocator, run.model.shard().kv_layout(), pool_bytes_of(run, system), max_tokens)
    scheduler = make_scheduler(system.scheduler, policy, max_tokens)
    scheduler.running = _residents(policy, batch, context, steps)
    model = make_step_model(run.device, run.engine, run.model, system)
    executor = ModelledExecutor(model, action_prices(run.device, policy))
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
        "attention_s": model.context_ps * context_tokens / PS_PER_S,
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


def _rows(run: Run, table: pd.DataFrame, context: int) -> Iterator[SummaryRow]:
    """Fig 8 and Table 7 where the run imitates them; and what the allocator took of a step."""
    systems = {system.name: system for system in run.systems}
    published = context == 16384 and run.imitates
    panel = panel_name(run.model) if published else f"{run.model.name} {context} tokens"
    cells: list[dict[str, Any]] = table.to_dict("records")  # type: ignore[assignment]
    for cell in cells:
        shared = {"experiment": NAME, "panel": panel, "x": cell["batch"], **columns(run, systems[cell["system"]])}

        def of(figure: str, quantity: str, value: float, unit: str, shared: dict[str, Any] = shared) -> SummaryRow:
            paper = "vattention" if figure != NAME else "kvarena"
            evidence = run.engine.evidence(figure, panel, shared["system"], shared["x"])
            return row(value, paper=paper, figure=figure, quantity=quantity, unit=unit, evidence=evidence, **shared)

        yield of("fig8", HEADLINE, cell["batch"] / cell["step_s"], "tok/s")
        yield of("table7", "decode_attention_time_vs_batch", 1e3 * cell["attention_s"], "ms")
        yield of(NAME, "step_time_vs_batch", 1e3 * cell["step_s"], "ms")
        yield of(NAME, "attention_share_of_step", 100 * cell["attention_s"] / cell["step_s"], "%")
        yield of(NAME, "allocator_stall_vs_batch", 1e6 * cell["stall_s"], "us")
        yield of(NAME, "actions_per_step_vs_batch", cell["actions"], "count")


def draw(summary: pd.DataFrame) -> Figure:
    """Fig 8: a panel per model, lines modelled, dots published."""
    ours = summary[summary.quantity == HEADLINE]
    theirs = published_values("vattention", figure="fig8")
    panels = list(dict.fromkeys(ours.panel))
    figure, axes = plots.canvas(1, len(panels), width=5)
    for axis, panel in zip(axes, panels, strict=True):
        rows = ours[ours.panel == panel]
        for number, (name, line) in enumerate(rows.groupby("system", sort=False)):
            colour = plots.PAPER_COLOURS.get(str(name), f"C{number}")
            axis.plot(line.x, line.value, "-" if name in plots.PAPER_COLOURS else ":", color=colour, label=str(name))
            dots = theirs[(theirs.panel == panel) & (theirs.system == name)]
            axis.plot(dots.x, dots.value, "o", ms=4, color=colour)
        clock = f"{rows.kernel.iloc[0]} on {rows.device.iloc[0]}, {rows.clock.iloc[0]}"
        axis.set(ylabel="decode tokens/s", title=f"vAttention Fig 8: {panel}; dots published\n{clock}")
        axis.set_ylim(0, None)
        plots.batch_axis(axis, sorted(rows.x.unique()))
        axis.legend(fontsize=7, frameon=False, loc="upper left")
    figure.tight_layout()
    return figure
