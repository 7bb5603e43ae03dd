"""Parallel sampling (PagedAttention Fig 14 a-c): normalized latency against request rate with n samples of a prompt.

Blocks share the prompt and copy its last one on the first write; vAttention maps its whole page-groups into every
sample's row; Orca reserves and writes a copy for each.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import pandas as pd
from matplotlib.figure import Figure

from kvarena.errors import UserError
from kvarena.experiments.latency_curve import (
    CROSSING,
    Curves,
    Line,
    ServeAt,
    chosen_panels,
    draw_curves,
    guess_of,
    measure_lines,
)
from kvarena.experiments.replay import Replayer, workload_of
from kvarena.harness.decoding.config import DecodingConfig
from kvarena.harness.record import Outcome, Recorder
from kvarena.harness.run import Run
from kvarena.harness.systems import System

NAME = "parallel_sampling"
HEADLINE = CROSSING


@dataclass
class Panel:
    """One panel of the figure."""

    n: int  # samples of a request, or the width of a beam
    guess: dict[str, float] = field(default_factory=dict)  # requests/s where the search begins, by system or `others`


@dataclass
class Params(Curves):
    """`params.*` of conf/experiment/parallel_sampling.yaml; null there means: by the profile."""

    panels: dict[str, Panel] = field(default_factory=dict)  # by figure
    only: list[str] | None = None  # figures to run; null: all
    pool_bytes: int | None = None  # null: the pool the engine ran with
    max_rows: int | None = None  # of vAttention's virtual tensors; null: as its allocator says


def run(run: Run, recorder: Recorder) -> Outcome:
    """Replay every panel."""
    summary, points = measure_lines(run, recorder, list(_lines(run)))
    return Outcome(summary, pd.DataFrame(), points, HEADLINE, draw(summary), notes(run))


def _lines(run: Run) -> Iterator[Line]:
    """The engine's constants come from Fig 12a, with one sequence a request."""
    replayer = Replayer(run)
    for figure, panel in chosen_panels(run.params.panels, run.params.only).items():
        decoding = DecodingConfig("parallel", n=panel.n)
        for system in with_rows(run.systems, run.params.max_rows):
            yield Line(
                key=f"{figure} {system.name}",
                system=system,
                figure=figure,
                panel=panel_named(run, f"parallel n={panel.n}"),
                evidence="measured" if run.clock == "measured" else "predicted",
                serve_at=serving(run, replayer, system, decoding),
                guess=guess_of(panel.guess, system),
            )


def with_rows(systems: Iterable[System], max_rows: int | None) -> Iterator[System]:
    """The systems, those of vAttention with so many rows: where page-groups are shared, rows may run out before memory.

    Rows are addresses, so that more of them take no memory. Raises UserError for a number below 1.
    """
    if max_rows is not None and max_rows < 1:
        raise UserError(f"params.max_rows={max_rows}: must be 1 or more")
    for system in systems:
        if max_rows is None or not hasattr(system.allocator, "max_rows"):
            yield system
        else:
            yield replace(system, allocator=replace(system.allocator, max_rows=max_rows))


def panel_named(run: Run, name: str) -> str:
    """The published panel where the run imitates its model, else with the model that ran."""
    return name if run.imitates else f"{run.model.name} {name}"


def serving(run: Run, replayer: Replayer, system: System, decoding: DecodingConfig) -> ServeAt:
    """Serves the run's workload at a rate, decoded in one way."""
    return lambda rate: replayer.serve(system, workload_of(run, rate=rate), decoding)


def notes(run: Run) -> dict[str, object]:
    """The workload at 1 request/s: others begin with the same requests."""
    return {"workload": workload_of(run, rate=1.0 if run.clock == "modelled" else 8.0).provenance}


def draw(summary: pd.DataFrame) -> Figure:
    """Fig 14 a to c."""
    return draw_curves(summary)
