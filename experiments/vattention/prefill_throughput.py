"""Prefill by prompt length (vAttention Figs 2 and 7, Table 6): what does the layout of K/V cost a prefill?

    throughput   prompt tokens over the time of their one iteration
    ratio        attention time of one system over another's, both at the same length (Fig 2)

One prompt at a time. The paper's Fig 2 compares two kernels of each library, one with a block table and one without;
pairs marked `same body` compare one kernel over two layouts.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pandas as pd
from matplotlib.figure import Figure

from kvarena.experiments.kit.cells import Cell, run_cells
from kvarena.experiments.kit.panels import Panel, curves, drawn, ratio
from kvarena.experiments.kit.published_models import by_model, model_columns, runs_by_model, unread_models
from kvarena.experiments.kit.quantities import Quantity, rows
from kvarena.experiments.vattention.driver_calls import check_counts
from kvarena.experiments.vattention.prefill_cell import Params, measured_cell, modelled_cell, shown
from kvarena.harness.record.record import Frames, Measured, Recorder
from kvarena.harness.record.statistics import median_interval
from kvarena.harness.record.summary import Names, SummaryRow, row
from kvarena.harness.run.named_systems import as_filed
from kvarena.harness.run.published import is_earned, label_of, named
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System, with_room_to_read

HEADLINE = "prefill_throughput_vs_context"
RATIO = "prefill_kernel_time_ratio_vs_context"
READS = {
    "modelled": ("model", "engine", "device", "systems"),
    "measured": ("model", "engine", "device", "systems", "threads"),
}
FIG2_UNDER = {  # the lower system of each of its lines; the published list has the upper ones
    "FA2_Paged / FA2": "vattention-fa2",
    "FI_Paged / FI": "vattention-flashinfer",
    "FI / FA2": "vattention-fa2",
    "FI_Paged / FA2": "vattention-fa2",
}


def unread(run: Run[Params]) -> dict[str, str]:
    """Keys that this run does not read, and what to write instead."""
    keys = unread_models(run, run.params.models)
    if run.clock == "modelled":
        keys["params.rounds"] = "a device model says the same every time; clock=measured repeats"
    else:
        keys["engine.cuda_graphs"] = "a prompt is no step that only decodes, which is what a graph can hold"
    return keys


def measure(run: Run[Params], recorder: Recorder) -> Measured:
    """Prefill every length with every system, model by model."""
    modelled = run.clock == "modelled"
    check_counts(run.params, "contexts", *([] if modelled else ["rounds"]))
    runs = {one.model.name: one for one in runs_by_model(run, run.params.models)} if modelled else {"prefill": run}
    take = modelled_cell if modelled else measured_cell
    cells = [Cell(key, partial(take, one), model_columns(one)) for key, one in runs.items()]
    return Measured(run_cells(run.experiment, recorder, cells))


def summarize(run: Run[Params], frames: Frames) -> Iterator[SummaryRow]:
    """Figs 2 and 7 and Table 6, and what the allocator held up, model by model."""
    for one, samples in by_model(run, frames["samples"]):
        yield from _rows(one, samples)
        yield from _ratios(one, samples)


def _rows(run: Run[Params], samples: pd.DataFrame) -> Iterator[SummaryRow]:
    for system in run.systems:
        for tokens, mine in shown(samples, system.name):
            yield from rows(QUANTITIES, mine, partial(named, run, system, x=tokens))


MEASURED = pd.Series(dtype=float)  # there is no first prompt apart
QUANTITIES = (
    Quantity(HEADLINE, "tok/s", lambda own: own.context / own.prefill_s, "fig7"),
    Quantity("prefill_time_vs_context", "s", "prefill_s", "table6"),
    Quantity("prefill_attention_time_vs_context", "s", "attention_s", "table6"),
    Quantity("allocator_stall_vs_context", "ms", lambda own: 1e3 * own.mapping_s),
    Quantity("first_prompt_stall_vs_context", "ms", lambda own: 1e3 * own.get("first_mapping_s", MEASURED)),
)


def _ratios(run: Run[Params], samples: pd.DataFrame) -> Iterator[SummaryRow]:
    """Attention time of one system over another's, round by round: Fig 2's lines, and ours of systems on one kernel."""
    for over, under in itertools.permutations(run.systems, 2):
        below = dict(shown(samples, under.name))
        for tokens, above in shown(samples, over.name):
            names = _pair(run, over, under, tokens)
            if is_earned(names) or _one_kernel(over, under):
                ratio = above.attention_s.to_numpy() / below[tokens].attention_s.to_numpy()
                if pd.notna(ratio).all():
                    yield row(median_interval(ratio), quantity=RATIO, unit="ratio", **names)


def _pair(run: Run[Params], over: System, under: System, tokens: int) -> Names:
    """What a pair is called: a line of Fig 2, or by both labels.

    Fig 2 has one device. Under the modelled clock a ratio is the same however many share the heads.
    """
    one_device = replace(run, model=replace(run.model, tp=1)) if run.clock == "modelled" else run
    for line, file in FIG2_UNDER.items():
        if _is_filed(run, under, file) and is_earned(names := named(one_device, over, "fig2", key=line, x=tokens)):
            return {**names, "label": line}
    return named(run, over, label=f"{label_of(run, over)} / {label_of(run, under)}", x=tokens)


def _is_filed(run: Run[Params], system: System, file: str) -> bool:
    filed = as_filed(file, system.scheduler)
    if run.clock == "measured":
        filed = with_room_to_read(filed)
    return bool(system.allocator == filed.allocator and system.kernel == filed.kernel)


def _one_kernel(over: System, under: System) -> bool:
    """Whether two systems have one kernel over two allocators, the one with the plainer memory below."""
    order = {"static": 0, "vattention": 1, "paged": 2}
    return bool(
        over.kernel.name == under.kernel.name and order.get(over.allocator.name, 9) > order.get(under.allocator.name, 9)
    )


PANELS = (
    Panel(curves, HEADLINE, "prefill tokens/s", "prompt tokens", "prefill throughput", doubling=True),
    Panel(
        ratio, RATIO, "attention time, ratio", "prompt tokens", "attention of one system over another's", doubling=True
    ),
)


def draw(summary: pd.DataFrame) -> Figure:
    """Throughput by prompt length, a panel per model; attention of one layout over another's where it is Fig 2's."""
    ratios = summary[summary.quantity == RATIO]
    earned = ratios[ratios.figure == "fig2"]
    shown = earned if len(earned) else ratios[ratios.setup == ratios.setup.iloc[-1:].squeeze()]
    return drawn(pd.concat([summary[summary.quantity == HEADLINE], shown]), PANELS)
