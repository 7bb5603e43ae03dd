"""Throughput on long prompts (vAttention Figs 9 and 11): how fast are requests served that all wait at the door?

    requests per minute = 60 x requests / time from the first arrival to the last finish

Nothing in it was fitted to these figures but, on an H100, one point each for two kernels (conf/engine says which).
"""

from collections.abc import Iterator
from functools import partial

import pandas as pd

from kvarena.experiments.kit.cells import Cell, run_cells
from kvarena.experiments.kit.long_contexts import READS as READS
from kvarena.experiments.kit.long_contexts import (
    LongContexts,
    assumed_lengths,
    runs_of_long_contexts,
    unread_of_long_contexts,
)
from kvarena.experiments.kit.panels import Panel, bars, drawn
from kvarena.experiments.kit.published_models import by_model, model_columns
from kvarena.experiments.kit.quantities import Quantity, columns, rows
from kvarena.experiments.kit.replay import Replayer, example_of, workload_of
from kvarena.harness.record.metrics import makespan_s
from kvarena.harness.record.record import Frames, Measured, Recorder
from kvarena.harness.record.summary import SummaryRow
from kvarena.harness.record.time_averages import Average, averages
from kvarena.harness.run.published import is_earned, named
from kvarena.harness.run.run import Run

HEADLINE = "offline_throughput"
FIGURES = ("fig9", "fig11")  # on the A100 and on the H100
OURS = columns({
    "makespan": "s", "mean_batched_requests": "requests", "output_tokens_per_s": "tok/s", "preemptions": "count",
    "finished": "count", "allocator_stall_share": "%", "prefill_share": "%",
})  # fmt: skip


Params = LongContexts
unread = unread_of_long_contexts


def measure(run: Run[Params], recorder: Recorder) -> Measured:
    """Serve all requests with every system, model by model."""
    runs = runs_of_long_contexts(run)
    cells = [Cell(one.model.name, partial(_cell, one), model_columns(one)) for one in runs]
    return Measured(run_cells(run.experiment, recorder, cells), {"workload": example_of(runs[0]).provenance})


def _cell(run: Run[Params]) -> Frames:
    """One model: what happened to every request, and totals by system."""
    workload, replayer = workload_of(run), Replayer(run)
    served = [replayer.serve(system, workload) for system in run.systems]
    totals = [_totals(s.requests, s.steps) for s in served]
    return {"requests": pd.concat([s.requests for s in served]), "totals": pd.DataFrame(totals)}


def _totals(requests: pd.DataFrame, steps: pd.DataFrame) -> dict[str, object]:
    done = requests[requests.finish_ps.notna()]
    span_s, busy = makespan_s(requests), float(steps.duration_ps.sum())
    return {
        "system": steps.system.iloc[0],
        HEADLINE: 60 * len(done) / span_s,
        "makespan": span_s,
        "mean_batched_requests": float(averages(steps).set_index("average").batch[Average.OVER_TIME]),
        "output_tokens_per_s": float(done.output_tokens.sum()) / span_s,
        "preemptions": int(requests.num_preemptions.sum()),
        "finished": len(done),
        "allocator_stall_share": 100 * float(steps.stall_ps.sum()) / busy,
        "prefill_share": 100 * float(steps.duration_ps[steps.prefills > 0].sum()) / busy,
    }


def summarize(run: Run[Params], frames: Frames) -> Iterator[SummaryRow]:
    """Fig 9 or 11, and what lies behind it, model by model."""
    for one, totals in by_model(run, frames["totals"]):
        for system in run.systems:
            names = partial(named, one, system, assuming=assumed_lengths(run))
            figure = next((each for each in FIGURES if is_earned(names(each))), FIGURES[0])
            quantities = [Quantity(HEADLINE, "req/min", HEADLINE, figure), *OURS]
            yield from rows(quantities, totals[totals.system == system.name], names)


draw = partial(drawn, panels=[Panel(bars, HEADLINE, "requests/min", what="offline throughput")], width=4.6)
