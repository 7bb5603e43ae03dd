"""A resolved run: everything an experiment needs to know, typed, with nothing left open."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from typing import Any, ClassVar, Generic, Protocol, TypeVar, runtime_checkable

from omegaconf import DictConfig, OmegaConf

from kvarena.errors import UserError
from kvarena.harness.accounts import told
from kvarena.harness.config import AUTO, CLOCKS, GROUPS, PLAIN_KEYS, keys_of, load, names, no_such_key, typed
from kvarena.harness.model import ModelConfig
from kvarena.harness.modelled.device_model import DeviceConfig
from kvarena.harness.modelled.engine_config import EngineConfig
from kvarena.harness.requests.decoding import GREEDY, DecodingConfig
from kvarena.harness.run import schemas, systems
from kvarena.harness.run.contents import contents
from kvarena.harness.run.fit import check_fit
from kvarena.harness.run.named_systems import build, check_written_once, kept, there_are
from kvarena.harness.run.numbers import check_given_params, check_numbers
from kvarena.harness.run.published import Figure
from kvarena.harness.run.systems import System
from kvarena.harness.trace.arrival import UNDRAWN, ArrivalConfig
from kvarena.harness.trace.config import TraceConfig
from kvarena.harness.trace.file_arrivals import chosen_arrivals
from kvarena.harness.trace.published_files import is_published

CHECKPOINT = "checkpoint"
_KEYS = (*GROUPS[1:], *PLAIN_KEYS, "name", "params", "profiles", "published")
_STATED = ("published", "reads", "given", "gpu")


Plain = dict[str, Any]  # as YAML has it: values of every kind
P = TypeVar("P", covariant=True)


@runtime_checkable
class Pooled(Protocol):
    """Params of an experiment that serves from a pool."""

    @property
    def pool_bytes(self) -> int | None:
        """Bytes of K/V on one device; None: what the engine ran with, or the device has left."""


@runtime_checkable
class Stretched(Protocol):
    """Params of an experiment whose engines stretch a model's positions (RoPE scaling)."""

    @property
    def context(self) -> int | None:
        """Tokens of the longest sequence; None: the model's."""


@runtime_checkable
class TakesWholeFiles(Stretched, Protocol):
    """Params of an experiment whose engines stretch positions to a file's longest request, unless `context` is set."""

    takes_whole_files: ClassVar[bool]


@dataclass(frozen=True, slots=True)
class Run(Generic[P]):
    """One resolved run of one experiment; `P` is the dataclass of its own keys. `Run[object]` is of any."""

    experiment: str
    clock: str  # of CLOCKS
    device: DeviceConfig
    model: ModelConfig
    trace: TraceConfig
    arrival: ArrivalConfig
    engine: EngineConfig
    systems: tuple[System, ...]
    params: P
    decoding: DecodingConfig = GREEDY  # of every request, unless trace.mix says otherwise
    threads: int | None = None  # compute threads; None: as kernels/threads.py chooses
    arrival_chosen: str = ""  # by whom: of file_arrivals.py
    files: dict[str, str] = field(default_factory=dict)  # read by it, by path: hash of the content
    # What the experiment states, and what the user wrote: no part of what defines the numbers.
    published: dict[str, Figure] = field(default_factory=dict)  # by figure: what its points ran with
    reads: tuple[str, ...] = ()  # groups of keys that this experiment reads under this clock
    given: tuple[str, ...] = ()  # keys of the command line
    gpu: str | None = None  # of a finished run that was measured on one, as its driver calls it; None: this machine's

    @property
    def pool_bytes(self) -> int | None:
        """Bytes of K/V on one device, where `params.pool_bytes` sets them."""
        return self.params.pool_bytes if isinstance(self.params, Pooled) else None

    @property
    def context(self) -> int:
        """Tokens of the longest sequence: the model's context, or what `trace.max_tokens` confines it to."""
        stretched = self.params.context if isinstance(self.params, Stretched) else None
        context = stretched or self.model.max_tokens
        return min(context, self.trace.max_tokens or context)

    @property
    def limit(self) -> int | None:
        """Tokens above which a request of the trace is left out; None: its longest says how long sequences get."""
        whole = isinstance(self.params, TakesWholeFiles) and self.params.context is None
        return None if whole and self.trace.path is not None and self.clock == "modelled" else self.context

    def kernel_of(self, system: System) -> str:
        """The kernel that runs; under the modelled clock the engine, whose constants price a whole step."""
        return self.engine.name if self.clock == "modelled" else system.kernel.name

    @property
    def device_name(self) -> str:
        """The device as results name it: cpu, the GPU, or the one that was modelled."""
        if self.device.kind != "cuda":
            return self.device.name
        return (self.gpu or _gpu_here()).lower().replace(" ", "-")

    def plain(self) -> Plain:
        """The run as plain data: what is hashed, and written to config.yaml."""
        return {
            key: [asdict(s) for s in value] if key == "systems" else plain(value)
            for key, value in ((name, getattr(self, name)) for name in self.__dataclass_fields__)
            if key not in _STATED
        }


def plain(value: object) -> object:
    """A dataclass as a mapping; everything else as it is."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def resolve(
    config: DictConfig,
    overrides: Sequence[str],
    params_schema: type[P],
    reads: Mapping[str, Sequence[str]] | None = None,
) -> Run[P]:
    """Turn a composed configuration into a run; `reads`: clock -> groups of keys that the experiment reads under it.

    Raises UserError for whatever does not exist or does not fit.
    """
    unknown = [str(key) for key in config if key not in _KEYS]
    if unknown:
        raise no_such_key(unknown[0], _KEYS)
    if config.clock not in CLOCKS:
        raise UserError(f"clock={config.clock}: no such clock. There are: {', '.join(CLOCKS)}")
    if not (config.threads is None or (isinstance(config.threads, int) and config.threads > 0)):
        raise UserError(f"threads={config.threads}: a number of threads, at least 1, or null")
    given = keys_of(overrides)
    device, kind = _device(config)
    profile = config.profiles.get(kind) or OmegaConf.create()
    listed = config.systems or profile.get("systems") or []
    listed = [listed] if isinstance(listed, str) else listed
    _check_listed(listed, config.systems, given)
    stated = kept(listed, config.allocator.name, config.kernel.name)
    if "systems" in given:
        check_written_once(listed, config.allocator.name, overrides)
    built = tuple(systems.unlike([build(system, config.scheduler, overrides) for system in stated], stated))
    model = _model(config, profile)
    if config.clock == "measured":
        check_fit(built, model, device.kind)
        if device.kind == "cuda":  # the host's kernels read nothing past a length
            built = tuple(map(systems.with_room_to_read, built))
    else:
        check_fit(built)
    engine = typed(EngineConfig, config.engine, "engine")
    by_kernel = config.clock == "measured" or bool(engine.attention)
    run = Run(
        experiment=config.name,
        clock=config.clock,
        device=device,
        model=model,
        trace=_trace(config, profile, given),
        arrival=typed(
            ArrivalConfig, _filled("arrival", config.arrival, _drawn(config.arrival, profile), given), "arrival"
        ),
        engine=engine,
        systems=systems.distinct(built, by_kernel),
        decoding=typed(
            DecodingConfig, _filled("decoding", config.decoding, profile.get("decoding"), given), "decoding"
        ),
        params=typed(params_schema, _filled("params", config.params, profile.get("params"), given), "params"),
        threads=config.threads,
        published=_stated(config),
        reads=tuple((reads or {}).get(config.clock, ())),
        given=given,
    )
    for group in ("model", "trace", "arrival", "engine", "device", "decoding", "params"):
        check_numbers(group, getattr(run, group))
    check_given_params(run.params, given)
    told.forget()  # what a run says of its traces it says anew
    run = replace(run, files=contents(run))  # before anything is read: what changes later is noticed
    if "arrival" not in run.reads:
        return run
    chosen = chosen_arrivals(run.trace, run.arrival, overrides, run.limit)
    return replace(run, arrival=chosen.arrival, arrival_chosen=chosen.by)


def _check_listed(listed: Sequence[str], written: Sequence[str] | None, given: Sequence[str]) -> None:
    """Raises UserError for systems that are no list, and for a list that the user wrote and left empty."""
    if not isinstance(listed, Sequence):
        raise UserError(f"systems={listed}: is a list of names, or one name. {there_are()}")
    if "systems" in given and (not listed or (written is not None and not written)):
        raise UserError(f"systems={written}: no system is left to run. {there_are()}")


def from_plain(config: Plain, params_schema: type[P], reads: Mapping[str, Sequence[str]]) -> Run[P]:
    """The run that `plain` describes; what its experiment states is taken from conf/ as it is now."""
    parts = ("allocator", "kernel", "scheduler")
    listed = [
        System(**{**each, **{group: _as_config(group, each[group]["name"], each[group]) for group in parts}})
        for each in config["systems"]
    ]
    return Run(
        experiment=config["experiment"],
        clock=config["clock"],
        device=typed(DeviceConfig, config["device"], "device"),
        model=typed(ModelConfig, config["model"], "model"),
        trace=typed(TraceConfig, config["trace"], "trace"),
        arrival=typed(ArrivalConfig, config["arrival"], "arrival"),
        engine=typed(EngineConfig, config["engine"], "engine"),
        systems=tuple(listed),
        params=typed(params_schema, config["params"], "params"),
        decoding=typed(DecodingConfig, config["decoding"], "decoding"),
        threads=config["threads"],
        arrival_chosen=config.get("arrival_chosen", ""),
        files=dict(config.get("files", {})),
        published=_stated(load("experiment", config["experiment"])),
        reads=tuple(reads.get(config["clock"], ())),
    )


def _stated(experiment: DictConfig) -> dict[str, Figure]:
    """What an experiment states of its published points, by figure."""
    figures = experiment.get("published") or {}
    return {str(name): typed(Figure, node, f"published.{name}") for name, node in figures.items()}


def _as_config(group: str, name: str, node: object) -> Any:  # a dataclass with fields of its own
    return typed(schemas.of(group, name), node, group)


def _filled(group: str, node: DictConfig, profile: DictConfig | None, given: Sequence[str]) -> DictConfig:
    """A group whose nulls are taken from the profile of the device, but for those that the user wrote."""
    own, filled = ({str(key): value for key, value in each.items()} for each in (node, profile or DictConfig({})))
    kept = {key: value for key, value in own.items() if value is not None or f"{group}.{key}" in given}
    inner = {key for key in kept if any(each.startswith(f"{group}.{key}.") for each in given)}  # a part of it is given
    filed = {key: OmegaConf.to_container(filled[key]) for key in inner if filled.get(key) is not None}
    parts = {key: OmegaConf.merge(value, kept[key]) for key, value in filed.items()}  # plain: keys may be added
    return OmegaConf.create({**filled, **kept, **parts})


def _trace(config: DictConfig, profile: DictConfig, given: Sequence[str]) -> TraceConfig:
    """The trace; somebody's own file is repeated only where so many requests are asked for: no paper's number does."""
    trace = typed(TraceConfig, _filled("trace", config.trace, profile.get("trace"), given), "trace")
    asked = {"trace.num_requests", "trace.repeat"} & set(given)
    return trace if trace.path is None or asked or is_published(trace) else replace(trace, repeat=False)


def _drawn(arrival: DictConfig, profile: DictConfig) -> DictConfig | None:
    """The profile's arrivals; they are drawn, so arrivals that are recorded, or all at once, take nothing of them."""
    return None if arrival.process in UNDRAWN else profile.get("arrival")


def _device(config: DictConfig) -> tuple[DeviceConfig, str]:
    """The device, and its kind: cpu, cuda or modelled."""
    node = config.device
    if config.clock == "modelled":
        if node.name == AUTO and (profile := config.profiles.get("modelled")):
            node = _with_fields(load("device", profile.device), node)
        if node.get("kind") != "modelled":
            modelled = [name for name in names("device") if load("device", name).get("kind") == "modelled"]
            raise UserError(
                f"clock=modelled device={node.name}: not a device model. There are: {', '.join(modelled)}"
                if "modelled" in config.profiles
                else f"clock=modelled: {config.name} has no modelled form yet; it runs with clock=measured"
            )
        if "modelled" not in config.profiles:
            raise UserError(f"clock=modelled: {config.name} has no modelled form yet; it runs with clock=measured")
    elif node.get("kind") == "modelled":
        raise UserError(f"device={node.name} is a device model: it needs clock=modelled. Measured: auto, cpu, cuda")
    elif node.name == AUTO:
        node = _with_fields(load("device", "cuda" if _has_cuda() else "cpu"), node)
    elif node.name == "cuda" and not _has_cuda():
        raise UserError("device=cuda: torch sees no CUDA GPU here. device=cpu runs everything for real on the CPU")
    return typed(DeviceConfig, node, "device"), node.kind


def _with_fields(chosen: DictConfig, auto: DictConfig) -> DictConfig:
    """What `auto` stands for, with what the user set of it."""
    return DictConfig(OmegaConf.merge(chosen, {key: auto[key] for key in auto if key not in ("name", "kind")}))


def _gpu_here() -> str:
    import torch

    return torch.cuda.get_device_name()


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _model(config: DictConfig, profile: DictConfig) -> ModelConfig:
    """The model: the profile's under `auto`, one read from its own config.json under `checkpoint`, else as named."""
    node = config.model
    if node.name == CHECKPOINT:
        from kvarena.harness.model.checkpoint import config_of_checkpoint

        if not node.get("checkpoint"):
            raise UserError("model=checkpoint needs model.checkpoint: a folder, or a name on the Hugging Face hub")
        chosen = {str(key): value for key, value in node.items() if key in ("dtype", "seed")}
        return config_of_checkpoint(node.checkpoint, **chosen)
    if node.name == AUTO:
        node = _with_fields(load("model", profile.get("model") or "bench-llama"), node)
    return typed(ModelConfig, node, "model")
