"""Parallel sampling (PagedAttention Fig 14 a-c): normalized latency against request rate with n samples of a prompt.

Blocks share the prompt and copy its last one on the first write; vAttention maps its whole page-groups into every
sample's row; Orca reserves and writes a copy for each.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

from kvarena.errors import UserError
from kvarena.experiments.kit.latency_curve import (
    CROSSING,
    Curves,
    Line,
    chosen_panels,
    draw_curves,
    guess_of,
    measure_lines,
    summarize_lines,
    unread_panels,
    unread_rates,
)
from kvarena.experiments.kit.reads import reads
from kvarena.experiments.kit.replay import Replayer, example_of
from kvarena.harness.record.record import Measured, Recorder
from kvarena.harness.requests.decoding import DecodingConfig
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System

HEADLINE = CROSSING
READS = reads("sharing", decoding=False)


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


def unread(run: Run[Params]) -> dict[str, str]:
    """Keys that this run does not read, and what to write instead."""
    params: Params = run.params
    rules = unread_of_sequences(run, run.params.max_rows) | unread_panels(params.panels, params.only)
    return rules | unread_rates(params, (f"params.panels.{figure}.guess" for figure in params.panels))


def unread_of_sequences(run: Run[object], max_rows: int | None) -> dict[str, str]:
    """The same of experiments whose own keys say how many sequences a request has."""
    rules = {"trace.mix": f"experiment={run.experiment} says itself how each request is decoded"}
    if max_rows is not None:
        rules["allocator.max_rows"] = "params.max_rows=N sets it"
        if not any(_has_rows(system) for system in run.systems):
            rules["params.max_rows"] = "no system of this run has rows to spare; allocator=vattention has"
    return rules


def measure(run: Run[Params], recorder: Recorder) -> Measured:
    """Replay every panel."""
    return Measured(measure_lines(run, recorder, list(_lines(run))), notes(run))


def _lines(run: Run[Params]) -> Iterator[Line]:
    """The engine's constants come from Fig 12a, with one sequence a request."""
    replayer = Replayer(run, sharing=True)
    for figure, panel in chosen_panels(run.params.panels, run.params.only).items():
        decoding = DecodingConfig("parallel", n=panel.n)
        for system in with_rows(run.systems, run.params.max_rows):
            yield Line(
                key=f"{figure} {system.name}",
                run=run,
                system=system,
                figure=figure,
                detail=f"parallel n={panel.n}",
                serve=partial(replayer.serve, system, decoding=decoding),
                guess=guess_of(panel.guess, system),
                point={"n": panel.n},
            )


summarize = partial(summarize_lines, _lines)


def _has_rows(system: System) -> bool:
    return bool(system.allocator.name == "vattention")


def with_rows(systems: Iterable[System], max_rows: int | None) -> Iterator[System]:
    """The systems, those of vAttention with so many rows: where page-groups are shared, rows may run out before memory.

    Rows are addresses, so that more of them take no memory. Raises UserError for a number below 1.
    """
    if max_rows is not None and max_rows < 1:
        raise UserError(f"params.max_rows={max_rows}: must be 1 or more")
    for system in systems:
        if max_rows is None or not _has_rows(system):
            yield system
        else:
            yield replace(system, allocator=replace(system.allocator, max_rows=max_rows))


def notes(run: Run[Params]) -> dict[str, object]:
    """The workload at 1 request/s: others begin with the same requests."""
    return {"workload": example_of(run, rate=1.0 if run.clock == "modelled" else 8.0).provenance}


draw = draw_curves
