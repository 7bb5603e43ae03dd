"""The panels of PagedAttention's Fig 12, and the curves in them.

A panel names its model, device, trace and duration, and the rates of each system's curve. A system without rates is
drawn around the rate at which it reaches the limit of latency, which a search finds.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

from kvarena.errors import UserError
from kvarena.experiments.kit.replay import Replayer, trace_named
from kvarena.experiments.kit.seeds import seeded, seeds_of
from kvarena.harness.config import load, typed
from kvarena.harness.model import load_preset
from kvarena.harness.modelled.engine_config import EngineConfig
from kvarena.harness.modelled.engine_fit import misfit
from kvarena.harness.record.summary import Names
from kvarena.harness.run.published import Point, earned, named, setup
from kvarena.harness.run.run import Run
from kvarena.harness.run.schemas import of
from kvarena.harness.run.systems import System

PADDED = "fastertransformer"  # the allocator and the scheduler whose batches panels size


@dataclass
class LatencyPanel:
    """One panel of the figure."""

    trace: str  # of conf/trace/
    duration_s: float  # of the arrivals
    model: str | None = None  # null: the run's
    tp: int = 1  # devices that share the panel's model: each holds its part of every token
    device: str | None = None  # null: the run's
    batch_size: int | None = None  # of FasterTransformer; null: its own default
    fastertransformer_duration_s: float | None = None  # where it differs
    rates: dict[str, list[float]] = field(default_factory=dict)  # requests/s by system; `others`: all not named
    guess: dict[str, float] = field(default_factory=dict)  # requests/s where the search for the crossing begins

    def __post_init__(self) -> None:
        """Refuse devices without the model that they would share."""
        if self.model is None and self.tp != 1:
            raise UserError(f"params.panels: tp={self.tp} needs a panel's model; model.tp is for the run's")

    def rates_of(self, system: System) -> list[float]:
        """Requests/s of a system's curve; none where it is searched."""
        return list(dict.fromkeys(self.rates.get(system.name) or self.rates.get("others") or []))


@dataclass
class OutOfSample:
    """Curves of some systems with an engine whose constants were fitted to the curves of others."""

    figure: str
    engine: str  # of conf/engine/
    systems: list[str]


@dataclass
class Params:
    """`params.*` of conf/experiment/serving_latency.yaml; null there means: by the profile."""

    panels: dict[str, LatencyPanel] = field(default_factory=dict)  # by figure: fig12a ...
    only: list[str] | None = None  # figures to run; null: all
    paths: dict[str, str | None] = field(default_factory=dict)  # trace -> file with its lengths; null: the table
    pool_bytes: int | None = None  # null: the pool the engine ran with
    seeds: list[int] = field(default_factory=lambda: [0])  # of traces and arrivals; at least 6 give a 95 % interval
    once: list[str] = field(default_factory=list)  # systems that are replayed under the first seed alone
    crossing: list[str] = field(default_factory=list)  # systems whose rate at LIMIT_S is searched, under the first seed
    tolerance: float = 0.01  # of that search
    out_of_sample: list[OutOfSample] = field(default_factory=list)


class Curve(NamedTuple):
    """One system in one panel."""

    key: str  # of its cells
    figure: str
    run: Run[Params]  # with the panel's model, device and trace
    replayer: Replayer  # of that run
    system: System
    panel: LatencyPanel
    detail: str  # tells the panel apart where another has the same model, trace and devices
    out_of_sample: bool = False

    @property
    def rates(self) -> list[float]:
        """Requests/s that are replayed; none: those around the crossing."""
        return self.panel.rates_of(self.system)

    @property
    def searched(self) -> bool:
        """Whether the rate at the limit of latency is searched."""
        return not self.out_of_sample and (self.system.name in self.run.params.crossing or not self.rates)

    @property
    def seeds(self) -> list[int]:
        """The seeds of its rates; the first alone of what is searched, or listed in `params.once`."""
        seeds = seeds_of(self.run)
        alone = self.out_of_sample or not self.rates or self.system.name in self.run.params.once
        return seeds[:1] if alone else seeds

    @property
    def duration_s(self) -> float:
        """Of the arrivals."""
        own = self.panel.fastertransformer_duration_s if self.system.scheduler.name == PADDED else None
        return own or self.panel.duration_s

    def ours(self, *, fitted: bool = False, x: float | None = None) -> Names:
        """Columns that name a row over all seeds. fitted: the engine's constants were fitted to this very quantity."""
        return named(self.run, self.system, detail=self.detail, x=x, fitted=fitted)

    def published(self, seed: int, x: float | None = None) -> Names:
        """Columns that name a row of one seed: those of the published point where it stands for one."""
        run, figure = seeded(self.run, seed), self.figure if self.figure in self.run.published else None
        return named(run, self.system, figure, detail=self.detail, x=x, **(self._facts if figure else {}))

    def beside(self, x: float | None = None) -> Point | None:
        """The published point of these very replays, whatever engine times them; None where anything else differs."""
        if self.figure not in self.run.published:
            return None
        stated = self.run.published[self.figure]
        for name in stated.panels:
            run = replace(seeded(self.run, 0), engine=_engine(str(stated.panel(name).engine)))
            if at := earned(run, self.system, self.figure, None, x, self._facts):
                return at
        return None

    def was_fitted(self, x: float | None = None) -> bool:
        """Whether the engine's constants come from the published point of these replays."""
        at = self.beside(x)
        return at is not None and bool(self.run.engine.was_fitted_to(str(at)))

    @property
    def _facts(self) -> dict[str, Any]:  # of every kind, as `named` takes them
        panel = self.panel
        return {
            "duration_s": panel.duration_s,
            "fastertransformer_duration_s": panel.fastertransformer_duration_s,
        }


def curves_of(run: Run[Params], panels: dict[str, LatencyPanel]) -> Iterator[Curve]:
    """Every panel's curves, then those out of sample: at the same rates, with another engine."""
    runs = {figure: run_of_panel(run, panel) for figure, panel in panels.items()}
    alike = Counter(setup(own) for own in runs.values())
    details = {figure: figure if alike[setup(own)] > 1 else "" for figure, own in runs.items()}
    for figure, panel in panels.items():
        own, detail = runs[figure], details[figure]
        replayer = Replayer(own)
        for system in run.systems:
            yield Curve(f"{figure}-{system.name}", figure, own, replayer, _sized(system, panel), panel, detail)
    for figure, engine, systems in out_of_sample(run, runs):
        own = replace(runs[figure], engine=engine, systems=tuple(systems))
        for system in systems:
            key = f"{figure}-{system.name}-{engine.name}"
            yield Curve(key, figure, own, Replayer(own), system, panels[figure], details[figure], out_of_sample=True)


def out_of_sample(run: Run[Params], runs: dict[str, Run[Params]]) -> Iterator[tuple[str, EngineConfig, list[System]]]:
    """Figure, engine and systems of the curves out of sample: in panels that run, on what the engine was fitted on."""
    if run.clock == "measured":
        return
    for other in run.params.out_of_sample:
        if own := runs.get(other.figure):
            engine = _engine(other.engine)
            systems = [
                s for s in run.systems if s.name in other.systems and own.params.panels[other.figure].rates_of(s)
            ]
            yield (
                other.figure,
                engine,
                [s for s in systems if misfit(engine, own.device, own.model, s.scheduler.name) is None],
            )


def run_of_panel(run: Run[Params], panel: LatencyPanel) -> Run[Params]:
    """The run with the panel's model, device and trace. Raises UserError for a device model under the wall clock."""
    if panel.model is not None:
        run = replace(run, model=load_preset(panel.model, tp=panel.tp))
    if panel.device is not None:
        if run.clock == "measured":
            raise UserError(f"params.panels: device={panel.device}: clock=measured runs on this machine; leave it out")
        run = replace(run, device=typed(of("device", panel.device), load("device", panel.device), "device"))
    trace, path = trace_named(run, panel.trace), run.params.paths.get(panel.trace)
    return replace(run, trace=replace(trace, path=path or trace.path, max_tokens=run.trace.max_tokens))


@cache
def _engine(name: str) -> EngineConfig:
    engine: EngineConfig = typed(EngineConfig, load("engine", name), "engine")
    return engine


def _sized(system: System, panel: LatencyPanel) -> System:
    """FasterTransformer's batch is as large as memory allows: a number for each model and trace."""
    if panel.batch_size is None or system.allocator.name != PADDED:
        return system
    return replace(system, allocator=replace(system.allocator, batch_size=panel.batch_size))
