"""Beam search (PagedAttention Fig 14 d-f): normalized latency against request rate with beams of width w.

Which beams live on decides how much they share. A measured run ranks them by the model's scores. A modelled one has no
scores and needs a survival model (harness/decoding/survival.py): its rows are conditional on that, and the two
extremes, one parent for all and no death at all, stand beside it as a band for the systems named. They are extremes of
memory. Rates may pass them by a percent: with one parent all other beams copy their last block in every step, which
takes vLLM 2 % of its time at w=4, against 0.9 % under neutral survival; with free copies `one` is the fastest.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import pandas as pd
from matplotlib.figure import Figure

from kvarena.experiments.latency_curve import (
    CROSSING,
    LATENCY,
    Line,
    chosen_panels,
    draw_curves,
    guess_of,
    measure_lines,
)
from kvarena.experiments.parallel_sampling import Params as SamplingParams
from kvarena.experiments.parallel_sampling import notes, panel_named, serving, with_rows
from kvarena.experiments.replay import Replayer
from kvarena.harness.decoding.config import DecodingConfig
from kvarena.harness.record import Outcome, Recorder
from kvarena.harness.run import Run

NAME = "beam_search"
HEADLINE = CROSSING
SURVIVAL = "neutral"  # of the rows that are compared
BAND = ("one", "all")  # the memory of any scores lies between
ASSUMED = {
    "survival": "modelled: each place of the next beam is filled from a parent drawn uniformly; no scores are known",
    "band": "extremes of memory, not time; one: all beams of the next step have one parent; all: every beam lives on",
}


@dataclass
class Params(SamplingParams):
    """`params.*` of conf/experiment/beam_search.yaml; null there means: by the profile."""

    band: list[str] = field(default_factory=list)  # systems that are replayed under the extremes of survival too


def run(run: Run, recorder: Recorder) -> Outcome:
    """Replay every panel."""
    summary, points = measure_lines(run, recorder, list(_lines(run)))
    return Outcome(summary, pd.DataFrame(), points, HEADLINE, draw(summary), {**notes(run), **ASSUMED})


def _lines(run: Run) -> Iterator[Line]:
    replayer = Replayer(run)
    measured = run.clock == "measured"
    for figure, panel in chosen_panels(run.params.panels, run.params.only).items():
        for survival in (SURVIVAL,) if measured else (SURVIVAL, *BAND):
            decoding = DecodingConfig("beam", n=panel.n, survival=survival)
            name = panel_named(run, f"beam w={panel.n}")
            for system in with_rows(run.systems, run.params.max_rows):
                if survival == SURVIVAL or system.name in run.params.band:
                    yield Line(
                        key=f"{figure} {system.name} {survival}",
                        system=system,
                        figure=figure if survival == SURVIVAL else NAME,
                        panel=name if survival == SURVIVAL else f"{name}, survival {survival}",
                        evidence="measured" if measured else "conditional",
                        serve_at=serving(run, replayer, system, decoding),
                        guess=guess_of(panel.guess, system),
                    )


def draw(summary: pd.DataFrame) -> Figure:
    """Fig 14 d to f; a shaded band is where a system crosses between the extremes of survival."""
    extreme = summary.panel.str.contains(", survival ")
    figure = draw_curves(summary[~extreme])
    panels = dict.fromkeys(summary[~extreme & (summary.quantity == LATENCY)].panel)
    crossings = summary[extreme & (summary.quantity == CROSSING)]
    for axis, panel in zip(figure.axes, panels, strict=False):
        for _, rows in crossings[crossings.panel.str.startswith(f"{panel}, ")].groupby("system"):
            axis.axvspan(rows.value.min(), rows.value.max(), color="#0072B2", alpha=0.12, lw=0, zorder=0)
    return figure
