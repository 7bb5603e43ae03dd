"""What a number may be called: paper, figure, panel, system and evidence of a row, decided here and nowhere else.

An experiment states, figure by figure, what the published points ran with (`published:` in conf/experiment/*.yaml). A
row earns the published name where what ran is that, in everything that is stated: model, devices, trace, arrivals, pool
and parameters, allocator, kernel, scheduler and engine. Whatever differs makes the row ours: `paper=kvarena`, a panel
that says what ran, a system `<allocator>/<kernel>`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from kvarena.allocators.options import with_options
from kvarena.harness.config import changed, load, typed
from kvarena.harness.model.config import ModelConfig
from kvarena.harness.model.presets import load_preset
from kvarena.harness.record.summary import Evidence, Names
from kvarena.harness.requests.decoding import GREEDY
from kvarena.harness.run.named_systems import as_filed
from kvarena.harness.run.systems import System, alike, with_room_to_read
from kvarena.harness.trace.config import TraceConfig
from kvarena.harness.trace.published_files import is_published

if TYPE_CHECKING:
    from kvarena.harness.run.run import P, Run

Keys = dict[str, Any]  # of conf/: OmegaConf has no type for values of every kind but Any
OURS = "kvarena"  # the paper of rows that are nobody else's
LEAN = "lean"  # the engine that was fitted to no paper's
_NOT_WEIGHED = {  # fields in which a run may differ and still be the published one
    "model": ("seed", "checkpoint", "shard_only"),  # lengths are the trace's, whatever the weights
    "trace": ("path", "format", "tokenizer", "data_files", "split", "on_bad_record", "keep_hash_ids",
              "prefix_path", "table"),  # where its lengths come from is told by `is_published`
    "engine": ("devices", "schedulers", "models"),  # they say what is refused, not how long a step takes
}  # fmt: skip


@dataclass
class Ran:
    """What the points of one published panel ran with. What is not stated does not define them."""

    model: str | None = None  # of conf/model/, as it stands there
    tp: int = 1  # devices that share it
    device: str | None = None  # of conf/device/
    engine: str | None = None  # of conf/engine/; modelled clock
    scheduler: str | None = None  # of systems whose file names none
    trace: str | None = None  # of conf/trace/: its table, or a file listed in results/published/trace_files.csv
    trace_keys: Keys = field(default_factory=dict)  # where they differ from that file's
    arrival: Keys = field(default_factory=dict)  # process, rate (unless it is the axis), duration_s, seed
    params: Keys = field(default_factory=dict)  # of the experiment
    allocator: Keys = field(default_factory=dict)  # fields of those systems whose allocator has them
    point: Keys = field(default_factory=dict)  # what the experiment itself says of a point


@dataclass
class Figure:
    """One published figure or table: `published.<figure>` of an experiment."""

    paper: str
    systems: dict[str, str | None] = field(default_factory=dict)  # key in the figure -> name or pair, if any
    ran: Keys = field(default_factory=dict)  # of all panels
    panels: dict[str, Keys | None] = field(default_factory=dict)  # name -> what its own points ran with

    def __post_init__(self) -> None:
        """Refuse keys that no `Ran` has."""
        self._ran = {name: self._merged(name) for name in self.panels}  # asked for every row

    def panel(self, name: str) -> Ran:
        """What the points of a panel ran with."""
        return self._ran[name]

    def _merged(self, name: str) -> Ran:
        own = self.panels[name] or {}
        merged = {**self.ran, **own}
        for key in ("trace_keys", "arrival", "params", "allocator", "point"):
            merged[key] = {**self.ran.get(key, {}), **own.get(key, {})}
        return typed(Ran, merged, f"published.panels.{name}")


class Point(NamedTuple):
    """A point of a published figure."""

    paper: str
    figure: str
    panel: str
    system: str
    x: float | None

    def __str__(self) -> str:
        """`figure/panel/system/x`, as engines and devices list what they were fitted to; nothing for an x of None."""
        return "/".join((self.figure, self.panel, self.system, "" if self.x is None else f"{self.x:g}"))


def named(
    run: "Run[object]",
    system: System | None = None,
    figure: str | None = None,
    *,
    key: str | None = None,
    label: str | None = None,
    detail: str = "",
    x: float | None = None,
    counted: bool = False,
    fitted: bool = False,
    assuming: str = "",
    **point: object,
) -> Names:
    """The columns of a summary row that say what it is: all but quantity, value and unit.

    figure: the published figure whose quantity the row has; None: a quantity of our own. key: what the figure calls the
    system, where one system is run in several ways; else the figure's own list says. label: our name, where it is not
    the system's. detail: more about what ran, for our panel. x: of the row. counted: arithmetic or a count. fitted: a
    constant was fitted to this quantity's published points, beside those that engine and device list. assuming: a
    modelled row's assumption. point: what the experiment says of the point, compared with what the figure states.
    """
    at = earned(run, system, figure, key, x, point) if figure is not None else None
    kind = evidence(run, at, system, counted=counted, fitted=fitted, assuming=assuming)
    ran, shown = setup(run, detail), label or label_of(run, system)
    names = at or Point(OURS, run.experiment, ran, shown, x)
    return {
        "experiment": run.experiment, "paper": names.paper, "figure": names.figure, "panel": names.panel,
        "system": names.system, "setup": ran, "label": shown, "evidence": kind,
        "allocator": system.allocator.name if system else "-",
        "kernel": run.kernel_of(system) if system else "-",
        "model": run.model.name if "model" in run.reads else "-",
        "clock": run.clock, "device": run.device_name, "x": x,
    }  # fmt: skip


def as_ours(names: Names) -> Names:
    """The columns of the same number under our own name, whatever it earned."""
    return {**names, "paper": OURS, "figure": names["experiment"], "panel": names["setup"], "system": names["label"]}


def is_earned(names: Names) -> bool:
    """Whether the columns that `named` gave are those of a published point."""
    return names["paper"] != OURS


def setup(run: "Run[object]", detail: str = "") -> str:
    """`<model> <trace>, <detail>, <n> x <device>`: what ran, whatever it may be called."""
    model = f"{run.model.name}{_told(changed(run.model, 'model', _NOT_NAMED))}" if "model" in run.reads else ""
    what = " ".join(filter(None, (model, _trace_name(run))))
    other = _told(changed(run.device, "device")) if run.clock == "modelled" else ""
    where = f"{run.model.tp} x {run.device_name}{other}" if "device" in run.reads else ""
    return ", ".join(filter(None, (what, detail, where)))


_NOT_NAMED = (*_NOT_WEIGHED["model"], "tp", "max_tokens")  # the devices say how many; a trace sets how long


def _told(changes: Mapping[str, object]) -> str:
    """` (key=value)`: in what a model or a device is not as the file of its name has it."""
    told = [key if isinstance(value, Mapping) else f"{key}={value}" for key, value in changes.items()]
    return f" ({', '.join(told)})" if told else ""


def without_trace(run: "Run[P]") -> "Run[P]":
    """The run as rows have it that no trace enters."""
    return replace(run, reads=tuple(group for group in run.reads if group != "trace"))


def _trace_name(run: "Run[object]") -> str:
    if "trace" not in run.reads:
        return ""
    trace = run.trace
    return trace.name if is_published(trace, run.files) or trace.path is None else trace.path.rpartition("/")[2]


def label_of(run: "Run[object]", system: System | None) -> str:
    """`<allocator>/<kernel>`; under the lean engine `<allocator> (as <published system>)` of a published one."""
    if system is None:
        return "-"
    if run.clock == "modelled" and run.engine.name == LEAN:
        for figure in run.published.values():
            for key, file in figure.systems.items():
                if file is not None and alike(system, as_filed(file, system.scheduler)):
                    return f"{system.shown_allocator} (as {key})"
    by_kernel = run.clock == "measured" or run.engine.attention  # else the engine times whole steps
    return f"{system.shown_allocator}/{system.kernel.name if by_kernel else run.engine.name}"


def earned(
    run: "Run[object]",
    system: System | None,
    figure: str,
    key: str | None,
    x: float | None,
    point: Mapping[str, object],
) -> Point | None:
    """The published point that the run stands for, None where anything that defines it differs.

    Raises KeyError for a figure that the experiment does not state.
    """
    stated = run.published[figure]
    for name in stated.panels:
        panel = stated.panel(name)
        if any(_differences(run, panel, point)):
            continue
        for each, file in stated.systems.items():
            if key in (None, each) and _is_system(run, system, panel, file):
                return Point(stated.paper, figure, name, each, x)
    return None


def differences(run: "Run[object]", figure: str, panel: str, **point: object) -> list[str]:
    """In what a run differs from what a published panel ran with: `model`, `arrival.rate` ..."""
    return list(_differences(run, run.published[figure].panel(panel), point))


def _differences(run: "Run[object]", panel: Ran, point: Mapping[str, object]) -> Iterator[str]:
    if panel.model is not None and not _alike("model", run.model, _model(panel.model, panel.tp)):
        yield "model"
    if panel.device is not None and not _is_device(run, panel.device):
        yield "device"
    if panel.engine is not None and run.clock == "modelled" and not _is_engine(run, panel.engine):
        yield "engine"
    if run.engine.cuda_graphs:  # no published engine had them
        yield "engine.cuda_graphs"
    if panel.trace is not None:
        trace = replace(_filed("trace", panel.trace), **panel.trace_keys)
        if not (is_published(run.trace, run.files) and _alike("trace", run.trace, trace)):
            yield "trace"
        if run.decoding != GREEDY:
            yield "decoding"
    yield from _arrival_differences(run, panel.arrival)
    for name, value in panel.params.items():
        if _plain(getattr(run.params, name)) != value:
            yield f"params.{name}"
    for name in sorted({*panel.point, *point}):
        if panel.point.get(name) != _plain(point.get(name)):
            yield name


def _is_engine(run: "Run[object]", name: str) -> bool:
    return run.engine.name == name and not changed(run.engine, "engine", _NOT_WEIGHED["engine"])


def _arrival_differences(run: "Run[object]", stated: Keys) -> Iterator[str]:
    """Whatever is stated of arrivals; where anything is, the seed too: the artifacts ran with 0, or as stated."""
    for name, value in stated.items():
        if name != "seed" and getattr(run.arrival, name) != value:
            yield f"arrival.{name}"
    if stated:
        seed = run.trace.seed if run.arrival.seed is None else run.arrival.seed
        if seed != stated.get("seed", 0):
            yield "arrival.seed"


def _plain(value: object) -> object:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _alike(group: str, one: ModelConfig | TraceConfig, other: ModelConfig | TraceConfig) -> bool:
    """Whether two configurations agree in all that makes a published point."""
    free = {name: getattr(other, name) for name in _NOT_WEIGHED[group]}
    return bool(replace(one, **free) == other)


def _is_device(run: "Run[object]", name: str) -> bool:
    published = _filed("device", name)
    if run.clock == "modelled":
        return bool(run.device == published)
    return run.device_name in [each.lower().replace(" ", "-") for each in published.reported_as]


def _is_system(run: "Run[object]", system: System | None, panel: Ran, file: str | None) -> bool:
    """Whether a system is the one of that name, with the panel's scheduler and fields of its allocator."""
    if file is None or system is None:
        return file is None
    if not _is_first(run, system):
        return False
    scheduler = system.scheduler if panel.scheduler is None else _filed("scheduler", panel.scheduler)
    published = as_filed(file, scheduler)
    published = replace(published, allocator=with_options(published.allocator, **panel.allocator))
    if run.clock == "measured":
        published = with_room_to_read(published)
    return alike(system, published)


def _is_first(run: "Run[object]", system: System) -> bool:
    """Whether no system before it in the run is the same under another name: one row has a published name."""
    same = [each.name for each in run.systems if alike(each, system)]
    return system.name not in same or same[0] == system.name


def evidence(
    run: "Run[object]", at: Point | None, system: System | None, *, counted: bool, fitted: bool, assuming: str
) -> str:
    """What kind of evidence a number is; `at` is the published point that it stands for, if any."""
    if counted:
        return Evidence.EXACT.value
    if run.clock == "measured":
        return Evidence.MEASURED.value
    if assuming or any(assumptions(run, system)):
        return Evidence.CONDITIONAL.value
    if fitted:
        return Evidence.CALIBRATED.value
    if at is not None and any(each.was_fitted_to(str(at)) for each in (run.engine, run.device)):
        return Evidence.CALIBRATED.value
    return Evidence.PREDICTED.value


def assumptions(run: "Run[object]", system: System | None) -> Iterator[str]:
    """What the model and the constants of a modelled run assume, in words."""
    if run.device.assumed:
        yield run.device.assumed
    step = run.engine.constants(run.model.name, system.scheduler.name) if system else None
    if step is not None and step.assumed:
        yield step.assumed


@cache
def _model(name: str, tp: int) -> ModelConfig:
    return load_preset(name, tp=tp)


@cache
def _filed(group: str, name: str) -> Any:  # another dataclass for each group
    """The dataclass of a file of conf/<group>/."""
    from kvarena.harness.run.schemas import of

    return typed(of(group, name), load(group, name), group)
