"""A resolved run: everything an experiment needs to know, typed, with nothing left open."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from kvarena.errors import UserError
from kvarena.harness import schemas, systems
from kvarena.harness.arrival import UNDRAWN
from kvarena.harness.config import AUTO, CLOCKS, GROUPS, PLAIN_KEYS, load, names, no_such_key, typed
from kvarena.harness.decoding.config import GREEDY, DecodingConfig
from kvarena.harness.file_arrivals import chosen_arrivals
from kvarena.harness.fit import check_fit
from kvarena.harness.model import ModelConfig, panel_name
from kvarena.harness.systems import System
from kvarena.harness.trace import told

CHECKPOINT = "checkpoint"
_KEYS = (*GROUPS[1:], *PLAIN_KEYS, "name", "params", "profiles")


@dataclass(frozen=True, slots=True)
class Run:
    """One resolved run of one experiment."""

    experiment: str
    clock: str  # of CLOCKS
    device: Any  # DeviceConfig
    model: ModelConfig
    trace: Any  # TraceConfig
    arrival: Any  # ArrivalConfig
    engine: Any  # EngineConfig
    systems: tuple[System, ...]
    params: Any  # the experiment's Params
    decoding: DecodingConfig = GREEDY  # of every request, unless trace.mix says otherwise
    threads: int | None = None  # compute threads; None: as kernels/threads.py chooses
    arrival_chosen: str = ""  # by whom: of file_arrivals.py

    @property
    def imitates(self) -> bool:
        """Whether the run stands for a published one: its model, modelled or on a GPU.

        One that decodes all requests in another way does not; figures of other ways say so themselves.
        """
        published = panel_name(self.model) != self.model.name
        as_published = self.decoding == GREEDY and getattr(self.trace, "mix", None) is None
        return published and as_published and (self.clock == "modelled" or self.device.kind == "cuda")

    def shown_as(self, system: System) -> str:
        """The published name where the run imitates that system, else `<allocator>/<kernel>`."""
        return system.published if self.imitates and system.published else system.label_with(self.kernel_of(system))

    @property
    def context(self) -> int:
        """Tokens of the longest sequence: the model's context, or what `trace.max_tokens` confines it to.

        `params.context` stands in for the model's, where an engine stretches its positions (RoPE scaling).
        """
        context = getattr(self.params, "context", None) or self.model.max_tokens
        return min(context, getattr(self.trace, "max_tokens", None) or context)

    @property
    def shown_model(self) -> str:
        """The model as published figures name it where the run imitates one, else by its own name."""
        return panel_name(self.model) if self.imitates else self.model.name

    def kernel_of(self, system: System) -> str:
        """The kernel that runs; under the modelled clock the engine, whose constants price a whole step."""
        return str(self.engine.name if self.clock == "modelled" else system.kernel.name)

    @property
    def device_name(self) -> str:
        """The device as results name it: cpu, the GPU, or the one that was modelled."""
        if self.device.kind != "cuda":
            return str(self.device.name)
        import torch

        return torch.cuda.get_device_name().lower().replace(" ", "-")

    def plain(self) -> dict[str, Any]:
        """The run as plain data: what is hashed, and written to config.yaml."""
        return {
            key: [asdict(s) for s in value] if key == "systems" else _plain(value)
            for key, value in ((name, getattr(self, name)) for name in self.__dataclass_fields__)
        }


def _plain(value: Any) -> Any:
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value


def resolve(config: DictConfig, overrides: Sequence[str], params_schema: type) -> Run:
    """Turn a composed configuration into a run. Raises UserError for whatever does not exist or does not fit."""
    unknown = [str(key) for key in config if key not in _KEYS]
    if unknown:
        raise no_such_key(unknown[0], _KEYS)
    if config.clock not in CLOCKS:
        raise UserError(f"clock={config.clock}: no such clock. There are: {', '.join(CLOCKS)}")
    if not (config.threads is None or (isinstance(config.threads, int) and config.threads > 0)):
        raise UserError(f"threads={config.threads}: a number of threads, at least 1, or null")
    device, kind = _device(config)
    profile = config.profiles.get(kind) or OmegaConf.create()
    listed = config.systems or profile.get("systems") or []
    kept = systems.kept(listed, config.allocator.name, config.kernel.name)
    built = tuple(systems.build(s, config.scheduler, overrides, _as_config) for s in kept)
    model = _model(config, profile)
    if config.clock == "measured":
        check_fit(built, model, device.kind)
        if device.kind == "cuda":  # the host's kernels read nothing past a length
            built = tuple(map(systems.with_room_to_read, built))
    run = Run(
        experiment=config.name,
        clock=config.clock,
        device=device,
        model=model,
        trace=typed(schemas.of("trace"), _filled(config.trace, profile.get("trace")), "trace"),
        arrival=typed(schemas.of("arrival"), _filled(config.arrival, _drawn(config.arrival, profile)), "arrival"),
        engine=typed(schemas.of("engine", config.engine.get("name")), config.engine, "engine"),
        systems=built,
        decoding=typed(DecodingConfig, _filled(config.decoding, profile.get("decoding")), "decoding"),
        params=typed(params_schema, _filled(config.params, profile.get("params")), "params"),
        threads=config.threads,
    )
    told.forget()  # what a run says of its traces it says anew
    chosen = chosen_arrivals(run.trace, run.arrival, overrides, run.context, hasattr(run.params, "seeds"))
    return replace(run, arrival=chosen.arrival, arrival_chosen=chosen.by)


def _as_config(group: str, name: str, node: DictConfig) -> Any:
    return typed(schemas.of(group, name), node, group)


def _filled(node: DictConfig, profile: DictConfig | None) -> DictConfig:
    """A group whose nulls are taken from the profile of the device."""
    given = {key: value for key, value in node.items() if value is not None}
    return OmegaConf.create({**(profile or {}), **given})


def _drawn(arrival: DictConfig, profile: DictConfig) -> DictConfig | None:
    """The profile's arrivals; they are drawn, so arrivals that are recorded, or all at once, take nothing of them."""
    return None if arrival.process in UNDRAWN else profile.get("arrival")


def _device(config: DictConfig) -> tuple[Any, str]:
    """The device, and its kind: cpu, cuda or modelled."""
    node = config.device
    if config.clock == "modelled":
        if node.name == AUTO and (profile := config.profiles.get("modelled")):
            node = load("device", profile.device)
        modelled = [name for name in names("device") if load("device", name).get("kind") == "modelled"]
        if node.get("kind") != "modelled":
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
        node = load("device", "cuda" if _has_cuda() else "cpu")
    elif node.name == "cuda" and not _has_cuda():
        raise UserError("device=cuda: torch sees no CUDA GPU here. device=cpu runs everything for real on the CPU")
    return typed(schemas.of("device", node.name), node, "device"), node.kind


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
        given = [str(key) for key in node if key != "name"]
        if given:
            raise UserError(f"model.{given[0]}: name the model whose {given[0]} it is, model=NAME")
        node = load("model", profile.get("model") or "bench-llama")
    config_of_preset: ModelConfig = typed(ModelConfig, node, "model")
    return config_of_preset
