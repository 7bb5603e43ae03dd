"""Prefill by prompt length (vAttention Figs 2 and 7, Table 6): what does the layout of K/V cost a prefill?

    throughput   prompt tokens over the time of their one iteration
    ratio        attention time of one system over another's, both at the same length (Fig 2)

One prompt at a time. The paper's Fig 2 compares two kernels of each library, one with a block table and one without;
pairs marked `same body` compare one kernel over two layouts.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvarena.experiments import plots
from kvarena.experiments.driver_calls import check_counts
from kvarena.experiments.prefill_cell import measured_cell, modelled_cell, shown
from kvarena.experiments.published_models import runs_by_model
from kvarena.experiments.replay import columns
from kvarena.harness.progress import Progress
from kvarena.harness.record import Outcome, Recorder
from kvarena.harness.run import Run
from kvarena.harness.statistics import Estimate, median_interval
from kvarena.harness.summary import SummaryRow, frame, published_values, row

NAME = "prefill_throughput"
HEADLINE = "prefill_throughput_vs_context"
RATIO = "prefill_kernel_time_ratio_vs_context"
FIG2 = {  # its lines, as pairs of systems; it was taken with the heads of Llama-3-8B
    "FA2_Paged / FA2": ("FA2_Paged", "FA2_vAttention"),
    "FI_Paged / FI": ("FI_Paged", "FI_vAttention"),
    "FI / FA2": ("FI_vAttention", "FA2_vAttention"),
    "FI_Paged / FA2": ("FI_Paged", "FA2_vAttention"),
}


@dataclass
class Params:
    """`params.*` of conf/experiment/prefill_throughput.yaml; null there means: by the profile."""

    contexts: list[int] = field(default_factory=list)  # prompt lengths, tokens
    rounds: int = 0  # measured clock: interleaved repetitions, the samples of every interval
    models: dict[str, int] = field(default_factory=dict)  # modelled clock: name -> tensor-parallel degree
    pool_bytes: int | None = None


def run(run: Run, recorder: Recorder) -> Outcome:
    """Prefill every length with every system, model by model."""
    check_counts(run.params, "contexts", "rounds")
    tables: list[pd.DataFrame] = []
    rows: list[SummaryRow] = []
    if run.clock == "measured":
        with Progress(NAME, run.params.rounds + 1) as progress:
            samples = recorder.cell("prefill", partial(measured_cell, run, progress))["samples"]
        pairs = [(run, samples)]
    else:
        pairs = [(one, recorder.cell(one.model.name, partial(modelled_cell, one))["samples"])
                 for one in runs_by_model(run)]  # fmt: skip
    for one, samples in pairs:
        tables.append(samples.assign(model=one.model.name))
        rows += [*_rows(one, samples), *_ratios(one, samples)]
    summary = frame(rows)
    nothing = pd.DataFrame({"model": pd.Series(dtype=str)})
    return Outcome(summary, nothing, pd.concat(tables, ignore_index=True), HEADLINE, draw(summary))


def _rows(run: Run, samples: pd.DataFrame) -> Iterator[SummaryRow]:
    panel = run.shown_model
    for system in run.systems:
        for tokens, mine in shown(samples, system.name):
            shared = {"experiment": NAME, "panel": panel, "x": tokens, **columns(run, system)}
            theirs = {"paper": "vattention", **shared}
            ours = {"paper": "kvarena", "figure": NAME, "evidence": _evidence(run, NAME, shared), **shared}
            yield row(_estimate(tokens / mine.prefill_s), figure="fig7", quantity=HEADLINE, unit="tok/s",
                      evidence=_evidence(run, "fig7", shared), **theirs)  # fmt: skip
            for quantity, column in (("prefill_time_vs_context", "prefill_s"),
                                     ("prefill_attention_time_vs_context", "attention_s")):  # fmt: skip
                yield row(_estimate(mine[column]), figure="table6", quantity=quantity, unit="s",
                          evidence=_evidence(run, "table6", shared), **theirs)  # fmt: skip
            yield row(_estimate(1e3 * mine.mapping_s), quantity="allocator_stall_vs_context", unit="ms", **ours)
            if "first_mapping_s" in mine:
                value = _estimate(1e3 * mine.first_mapping_s)
                yield row(value, quantity="first_prompt_stall_vs_context", unit="ms", **ours)


def _evidence(run: Run, figure: str, shared: dict[str, Any]) -> str:
    if run.clock == "measured":
        return "measured"
    return str(run.engine.evidence(figure, shared["panel"], shared["system"], shared["x"]))


def _estimate(samples: pd.Series) -> Estimate | float:
    return median_interval(samples) if len(samples) > 1 else float(samples.iloc[0])


def _ratios(run: Run, samples: pd.DataFrame) -> Iterator[SummaryRow]:
    """Attention time of one system over another's, round by round: Fig 2's pairs, or those that share a kernel."""
    by_name = {run.shown_as(system): system for system in run.systems}
    imitated = run.imitates and set(FIG2["FA2_Paged / FA2"]) <= set(by_name)
    panel = run.shown_model
    for line, (over, under) in (FIG2 if imitated else _same_kernel(run)).items():
        if not {over, under} <= set(by_name):
            continue
        places: dict[str, Any] = {"paper": "vattention", "figure": "fig2"} if imitated else {
            "paper": "kvarena", "figure": NAME}  # fmt: skip
        named = {**columns(run, by_name[over]), "system": line, "experiment": NAME, "panel": panel}
        below = dict(shown(samples, by_name[under].name))
        for tokens, above in shown(samples, by_name[over].name):
            ratio = above.attention_s.to_numpy() / below[tokens].attention_s.to_numpy()
            shared = {**named, "x": tokens}
            kind = _evidence(run, "fig2", shared)
            yield row(_estimate(pd.Series(ratio)), quantity=RATIO, unit="ratio", evidence=kind, **places, **shared)


def _same_kernel(run: Run) -> dict[str, tuple[str, str]]:
    """Pairs of one kernel over two allocators, the one with the plainer memory below."""
    order = {"static": 0, "vattention": 1, "paged": 2}
    pairs = itertools.permutations(run.systems, 2)
    names = [
        (run.shown_as(a), run.shown_as(b)) for a, b in pairs if a.kernel.name == b.kernel.name
        and order.get(a.allocator.name, 9) > order.get(b.allocator.name, 9)
    ]  # fmt: skip
    return {f"{over} / {under}": (over, under) for over, under in names}


def draw(summary: pd.DataFrame) -> Figure:
    """Throughput by prompt length, a panel per model, and attention of one layout over another's; dots published."""
    published = published_values("vattention")
    ours, ratios = summary[summary.quantity == HEADLINE], summary[summary.quantity == RATIO]
    panels = list(dict.fromkeys(ours.panel))
    figure, axes = plots.canvas(1, len(panels) + 1, width=5)
    for axis, panel in zip(axes, panels, strict=False):
        rows = ours[ours.panel == panel]
        _lines(axis, rows, published[(published.figure == "fig7") & (published.panel == panel)])
        axis.set(ylabel="prefill tokens/s", title=f"{panel}\n{_where(rows)}", ylim=(0, None))
    shown_panel = "Llama-3-8B" if "Llama-3-8B" in set(ratios.panel) else ratios.panel.iloc[-1]
    rows = ratios[ratios.panel == shown_panel]
    _lines(axes[-1], rows, published[(published.figure == "fig2") & (published.panel == shown_panel)])
    axes[-1].axhline(1, color="black", lw=0.8)
    axes[-1].legend(fontsize=6, frameon=False, loc="upper right")
    axes[-1].set(ylabel="attention time, ratio", title=f"{shown_panel}\n{_where(rows)}")
    figure.tight_layout()
    return figure


def _where(rows: pd.DataFrame) -> str:
    dots = "; dots published" if rows.clock.iloc[0] == "modelled" else ""
    return f"{rows.device.iloc[0]}, {rows.clock.iloc[0]}{dots}"


def _lines(axis: Axes, ours: pd.DataFrame, theirs: pd.DataFrame) -> None:
    for number, (name, line) in enumerate(ours.groupby("system", sort=False)):
        colour = plots.PAPER_COLOURS.get(str(name), f"C{number}")
        axis.plot(line.x, line.value, "-" if not str(name).startswith("vattention-") else ":", color=colour,
                  label=str(name))  # fmt: skip
        if line.ci_low.notna().any():
            axis.fill_between(line.x, line.ci_low, line.ci_high, color=colour, alpha=0.2, lw=0)
        dots = theirs[theirs.system == name]
        axis.plot(dots.x, dots.value, "o", ms=4, color=colour)
    ticks = sorted(ours.x.unique())
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{x / 1024:g}K" for x in ticks], fontsize=8)
    axis.minorticks_off()
    axis.set_xlabel("prompt tokens")
    axis.legend(fontsize=6, frameon=False, loc="lower left")
