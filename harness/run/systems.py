"""Systems: what an experiment compares. An allocator, a kernel and a scheduling policy under one name."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf

from kvarena.allocators.registry import memory_layout, preset
from kvarena.errors import UserError
from kvarena.harness.config import ALL, fields_set, load, names, no_such_key, typed
from kvarena.harness.scheduler.registry import check_pair
from kvarena.kernels.registry import fits, kernel_spec

PAIRINGS = ("same body", "same library", "best of each")
_KEYS = ("allocator", "kernel", "scheduler", "pairing", "variant")


@dataclass(frozen=True, slots=True)
class System:
    """One line of a comparison."""

    name: str
    allocator: Any  # the allocator's config dataclass
    kernel: Any  # KernelConfig
    scheduler: Any  # SchedulerConfig
    pairing: str  # what a comparison with the others of that word isolates; only "same body" isolates the layout
    variant: str | None = None  # tells apart systems of one allocator: vattention-64KB

    @property
    def shown_allocator(self) -> str:
        """The allocator as labels have it."""
        return self.variant or str(self.allocator.name)

    @property
    def attention_key(self) -> str:
        """The kernel and the layout it reads, as engines tell costs of attention apart: fa2/paged, fa2/contiguous."""
        return f"{self.kernel.name}/{memory_layout(self.allocator.name).value}"

    @property
    def label(self) -> str:
        """`<allocator>/<kernel>`."""
        return f"{self.shown_allocator}/{self.kernel.name}"


def described(allocator: Any) -> str:
    """An allocator by what it is: its name, and the fields in which it differs from the defaults of that name."""
    filed = preset(allocator.name)
    own = {field.name: getattr(allocator, field.name) for field in fields(allocator) if field.name != "name"}
    return said(str(allocator.name), {name: value for name, value in own.items() if value != getattr(filed, name)})


def said(shown: str, values: Mapping[str, Any]) -> str:
    """A shown allocator with more of its fields: `vattention{page_group: 64KB}`."""
    words = ", ".join(f"{name}: {value}" for name, value in values.items())
    if not words:
        return shown
    return f"{shown[:-1]}, {words}}}" if shown.endswith("}") else f"{shown}{{{words}}}"


def distinct(systems: Sequence[System], by_kernel: bool) -> tuple[System, ...]:
    """The systems, with labels that differ: where two would be called alike, by scheduler or by their own names."""

    def shown(system: System) -> str:
        return system.label if by_kernel else system.shown_allocator

    told = []
    for system in systems:
        alike = [each for each in systems if shown(each) == shown(system)]
        if len(alike) > 1:
            by_scheduler = len({each.scheduler.name for each in alike}) == len(alike)
            apart = system.scheduler.name if by_scheduler else system.name
            system = replace(system, variant=f"{system.shown_allocator}, {apart}")
        told.append(system)
    return tuple(told)


def unlike(systems: Sequence[System]) -> Iterator[System]:
    """The systems, without those that the command line made like an earlier one: as filed they differ."""
    for number, system in enumerate(systems):
        if not any(alike(system, each) and not _filed_alike(system, each) for each in systems[:number]):
            yield system


def _filed_alike(one: System, other: System) -> bool:
    return alike(_built(one.name)[0], _built(other.name)[0])


def alike(one: System, other: System) -> bool:
    """Whether two systems are one in all but what they are called."""
    return (one.allocator, one.kernel, one.scheduler) == (other.allocator, other.kernel, other.scheduler)


def with_room_to_read(system: System) -> System:
    """Keep as many tokens mapped past a row's end as its kernel may touch, unless the user says how many."""
    if getattr(system.allocator, "read_past", 0) is not None:
        return system
    return replace(system, allocator=replace(system.allocator, read_past=kernel_spec(system.kernel.name).reads_past))


def kept(listed: Sequence[str], allocator: str, kernel: str) -> list[DictConfig]:
    """The system files that `allocator=` and `kernel=` keep.

    Of the experiment's systems where some match; else of all system files, those on the kernel that is asked for, or
    on the experiment's; else the pair of both, or of the allocator and the experiment's first kernel that can read it;
    and where none can, any system file. Raises UserError where nothing is left of an experiment's systems; one that
    compares none lists none.
    """
    if not listed and allocator == kernel == ALL:
        return []
    files = [_read(name) for name in listed]

    def matching(those: Sequence[DictConfig]) -> list[DictConfig]:
        return [s for s in those if allocator in (ALL, s.allocator.name) and kernel in (ALL, s.kernel.name)]

    if found := matching(files):
        return found
    if allocator != ALL and (files or kernel != ALL):
        kernels = [kernel] if kernel != ALL else list(dict.fromkeys(s.kernel.name for s in files))
        filed = matching([_read(name) for name in names("system")])
        reading = [name for name in kernels if fits(kernel_spec(name), memory_layout(allocator)) is None]
        if found := [s for s in filed if s.kernel.name in kernels]:
            return found
        if filed and not reading:
            return filed
        return [_pair(allocator, reading[0] if reading else kernels[0])]
    used = ", ".join(f"{s.name} ({s.allocator.name} + {s.kernel.name})" for s in files)
    raise UserError(
        f"allocator={allocator} kernel={kernel}: no system of this experiment uses that. "
        f"Its systems: {used}. Name both an allocator and a kernel to run another pair."
    )


def _pair(allocator: str, kernel: str) -> DictConfig:
    """A system that no file describes."""
    parts = {"allocator": {"name": allocator}, "kernel": {"name": kernel}}
    return OmegaConf.create({"name": f"{allocator}-{kernel}", "pairing": "best of each", **parts})


def _read(name: str) -> DictConfig:
    if name not in names("system"):
        raise UserError(f"systems: no such system {name!r}. There are: {', '.join(names('system'))}")
    config = load("system", name)
    unknown = [str(key) for key in config if key not in _KEYS]
    if unknown:
        raise no_such_key(f"conf/system/{name}.yaml: {unknown[0]}", _KEYS)
    if config.pairing not in PAIRINGS:
        raise UserError(f"conf/system/{name}.yaml: pairing {config.pairing!r} is none of {', '.join(PAIRINGS)}")
    variant, allocator = config.get("variant"), str(config.allocator.name)
    if variant is not None and not str(variant).startswith(allocator):
        raise UserError(f"conf/system/{name}.yaml: variant {variant!r} must begin with its allocator, {allocator}")
    config.name = name
    return config


def build(
    file: DictConfig,
    scheduler: DictConfig,
    overrides: Sequence[str],
    as_config: Callable[[str, str, DictConfig], Any],
) -> System:
    """A system from its file. Fields: group file, then system file, then command line; the last one wins.

    `scheduler` is the run's, for a system whose file names none; `scheduler=NAME` on the command line is for all.
    `as_config(group, name, node)` turns a node into its dataclass. Raises UserError for fields that it does not have,
    and for an allocator that the scheduler cannot drive.
    """
    parts = {}
    variant = file.get("variant")
    for group in ("allocator", "kernel"):
        name = file[group].name
        as_filed = OmegaConf.merge(load(group, name), file[group])
        node = DictConfig(OmegaConf.merge(as_filed, fields_set(group, overrides)))
        parts[group] = as_config(group, name, node)
        if group == "allocator" and node != as_filed:
            variant = described(parts[group])  # the file's word is for the file's fields
    asked = any(override.startswith("scheduler=") for override in overrides)
    policy = load("scheduler", file.scheduler) if file.get("scheduler") and not asked else scheduler
    check_pair(policy.name, parts["allocator"].name)
    return System(
        name=file.name,
        scheduler=as_config("scheduler", policy.name, _with_fields(policy, overrides)),
        pairing=file.pairing,
        variant=variant,
        **parts,
    )


def _with_fields(policy: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """A scheduler with those fields of the command line that it has: others are for other systems of the run."""
    from kvarena.harness.run.schemas import of

    own = {field.name for field in fields(of("scheduler", policy.name))}
    given = {key: value for key, value in fields_set("scheduler", overrides).items() if key in own}
    return DictConfig(OmegaConf.merge(policy, given))


def as_filed(name: str, scheduler: Any) -> System:
    """The system that a file of conf/system/ describes, nothing changed; `scheduler` where the file names none."""
    built, names_one = _built(name)
    return built if names_one else replace(built, scheduler=scheduler)


@cache  # asked for every row of a summary; nobody changes what it returns
def _built(name: str) -> tuple[System, bool]:
    """The system of a file, and whether it names a scheduler."""
    from kvarena.harness.run import schemas

    def as_config(group: str, choice: str, node: DictConfig) -> Any:
        return typed(schemas.of(group, choice), node, group)

    file = _read(name)
    return build(file, load("scheduler", "vllm"), (), as_config), bool(file.get("scheduler"))
