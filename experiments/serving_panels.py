"""The panels of PagedAttention's Fig 12, and the curves in them.

A panel names its model, device, trace and duration, and the rates of each system's curve.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from kvarena.experiments.replay import Replayer, trace_named
from kvarena.harness.config import load, typed
from kvarena.harness.model import load_preset
from kvarena.harness.run import Run
from kvarena.harness.schemas import of
from kvarena.harness.systems import System


@dataclass
class Panel:
    """One panel of the figure."""

    trace: str  # of conf/trace/
    duration_s: float  # of the arrivals
    model: str | None = None  # null: the run's
    tp: int = 1  # devices that share the model: each holds its part of every token
    device: str | None = None  # null: the run's
    batch_size: int | None = None  # of FasterTransformer; null: its own default
    fastertransformer_duration_s: float | None = None  # where it differs
    rates: dict[str, list[float]] = field(default_factory=dict)  # requests/s by system; `others`: all not named
    guess: dict[str, float] = field(default_factory=dict)  # requests/s where the search for the crossing begins


@dataclass
class OutOfSample:
    """Curves of some systems with an engine whose constants were fitted to the curves of others."""

    figure: str
    engine: str  # of conf/engine/
    systems: list[str]


class Curve(NamedTuple):
    """One system in one panel."""

    key: str  # of its cell
    figure: str
    run: Run  # with the panel's model, device and trace
    replayer: Replayer  # of that run
    system: System
    panel: Panel
    crossing: bool = False  # whether its rate at the limit of latency is searched
    out_of_sample: bool = False


def curves_of(run: Run, panels: dict[str, Panel]) -> Iterator[Curve]:
    """Every panel's curves, then those out of sample: at the same rates, with another engine."""
    for figure, panel in panels.items():
        own = run_of_panel(run, panel)
        replayer = Replayer(own)
        for system in run.systems:
            searched = system.name in run.params.crossing
            yield Curve(f"{figure}-{system.name}", figure, own, replayer, _sized(system, panel), panel, searched)
    for other in run.params.out_of_sample:
        if other.figure in panels:
            panel = panels[other.figure]
            engine = typed(of("engine", other.engine), load("engine", other.engine), "engine")
            own = replace(run_of_panel(run, panel), engine=engine)
            for system in [s for s in run.systems if s.name in other.systems]:
                key = f"{other.figure}-{system.name}-{engine.name}"
                yield Curve(key, other.figure, own, Replayer(own), system, panel, out_of_sample=True)


def run_of_panel(run: Run, panel: Panel) -> Run:
    """The run with the panel's model, device and trace."""
    if panel.model is not None:
        run = replace(run, model=load_preset(panel.model, tp=panel.tp))
    if panel.device is not None:
        run = replace(run, device=typed(of("device", panel.device), load("device", panel.device), "device"))
    trace, path = trace_named(run, panel.trace), run.params.paths.get(panel.trace)
    return replace(run, trace=replace(trace, path=path or trace.path))


def _sized(system: System, panel: Panel) -> System:
    """FasterTransformer's batch is as large as memory allows: a number for each model and trace."""
    if panel.batch_size is None or not hasattr(system.allocator, "batch_size"):
        return system
    return replace(system, allocator=replace(system.allocator, batch_size=panel.batch_size))
