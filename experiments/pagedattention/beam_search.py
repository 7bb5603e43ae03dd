"""Beam search (PagedAttention Fig 14 d-f): normalized latency against request rate with beams of width w.

Which beams live on decides how much they share. A measured run ranks them by the model's scores. A modelled one has no
scores and needs a survival model (harness/decoding/survival.py): its rows are conditional on that, and the two
extremes, one parent for all and no death at all, stand beside it as a band for the systems named. They are extremes of
memory. Rates may pass them by a percent: with one parent all other beams copy their last block in every step, which
takes vLLM 2 % of its time at w=4, against 0.9 % under neutral survival; with free copies `one` is the fastest.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import pandas as pd
from matplotlib.figure import Figure

from kvarena.experiments.kit import plots
from kvarena.experiments.kit.latency_curve import (
    CROSSING,
    LATENCY,
    Line,
    chosen_panels,
    draw_curves,
    guess_of,
    measure_lines,
    summarize_lines,
)
from kvarena.experiments.kit.replay import Replayer
from kvarena.experiments.pagedattention.parallel_sampling import READS as OF_SAMPLING
from kvarena.experiments.pagedattention.parallel_sampling import Params as SamplingParams
from kvarena.experiments.pagedattention.parallel_sampling import notes, with_rows
from kvarena.experiments.pagedattention.parallel_sampling import unread as unread_of_sampling
from kvarena.harness.record.record import Measured, Recorder
from kvarena.harness.requests.decoding import DecodingConfig
from kvarena.harness.run.run import Run

HEADLINE = CROSSING
READS = {clock: (*words, "beams") for clock, words in OF_SAMPLING.items()}
SURVIVAL = "neutral"  # of the rows that are compared
BAND = ("one", "all")  # the memory of any scores lies between
EXTREME = ", survival "  # what tells the setups of the band from the others
ASSUMED = {
    "survival": "modelled: each place of the next beam is filled from a parent drawn uniformly; no scores are known",
    "band": "extremes of memory, not time; one: all beams of the next step have one parent; all: every beam lives on",
}


@dataclass
class Params(SamplingParams):
    """`params.*` of conf/experiment/beam_search.yaml; null there means: by the profile."""

    band: list[str] = field(default_factory=list)  # systems that are replayed under the extremes of survival too


def unread(run: Run[Params]) -> dict[str, str]:
    """Keys that this run does not read, and what to write instead."""
    rules = unread_of_sampling(run)
    if run.clock == "measured":
        rules["params.band"] = "the model's scores say which beams live on; clock=modelled assumes"
    elif absent := set(run.params.band) - {system.name for system in run.systems}:
        rules["params.band"] = f"systems={', '.join(sorted(absent))}: not among those of this run"
    return rules


def measure(run: Run[Params], recorder: Recorder) -> Measured:
    """Replay every panel."""
    return Measured(measure_lines(run, recorder, list(_lines(run))), {**notes(run), **ASSUMED})


def _lines(run: Run[Params]) -> Iterator[Line]:
    replayer = Replayer(run, sharing=True)
    for figure, panel in chosen_panels(run.params.panels, run.params.only).items():
        for survival in (SURVIVAL,) if run.clock == "measured" else (SURVIVAL, *BAND):
            compared = survival == SURVIVAL
            decoding = DecodingConfig("beam", n=panel.n, survival=survival)
            for system in with_rows(run.systems, run.params.max_rows):
                if compared or system.name in run.params.band:
                    yield Line(
                        key=f"{figure} {system.name} {survival}",
                        run=run,
                        system=system,
                        figure=figure if compared else None,
                        detail=f"beam w={panel.n}" + ("" if compared else f"{EXTREME}{survival}"),
                        serve=partial(replayer.serve, system, decoding=decoding),
                        guess=guess_of(panel.guess, system),
                        point={"w": panel.n},
                        assuming=ASSUMED["survival"],
                    )


summarize = partial(summarize_lines, _lines)


def draw(summary: pd.DataFrame) -> Figure:
    """Fig 14 d to f; a shaded band is where a system crosses between the extremes of survival."""
    extreme = summary.setup.str.contains(EXTREME)
    figure = draw_curves(summary[~extreme])
    setups = dict.fromkeys(summary[~extreme & (summary.quantity == LATENCY)].setup)
    crossings = summary[extreme & (summary.quantity == CROSSING)]
    base = crossings.setup.str.replace(f"{EXTREME}\\w+", "", regex=True)
    for axis, setup in zip(figure.axes, setups, strict=False):
        for _, rows in crossings[base == setup].groupby("label"):
            colour = plots.colour_of(rows.allocator.iloc[0])
            axis.axvspan(rows.value.min(), rows.value.max(), color=colour, alpha=0.12, lw=0, zorder=0)
    return figure
