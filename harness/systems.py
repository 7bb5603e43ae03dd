"""Systems: what an experiment compares. An allocator, a kernel and a scheduling policy under one name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from kvarena.errors import UserError
from kvarena.harness.config import ALL, fields_set, load, names, no_such_key
from kvarena.kernels.registry import kernel_spec

PAIRINGS = ("same body", "same library", "best of each")
_KEYS = ("allocator", "kernel", "scheduler", "pairing", "published", "variant")


@dataclass(frozen=True, slots=True)
class System:
    """One line of a comparison."""

    name: str
    allocator: Any  # the allocator's config dataclass
    kernel: Any  # KernelConfig
    scheduler: Any  # SchedulerConfig
    pairing: str  # what a comparison with the others of that word isolates; only "same body" isolates the layout
    published: str | None  # the paper's name for it, worn only where the run imitates that system
    variant: str | None = None  # tells apart systems of one allocator: vattention-64KB

    @property
    def label(self) -> str:
        """`<allocator>/<kernel>`: what a system that imitates nobody is called."""
        return self.label_with(self.kernel.name)

    def label_with(self, kernel: str) -> str:
        """The label where something else than its kernel says how long a step takes."""
        return f"{self.variant or self.allocator.name}/{kernel}"


def with_room_to_read(system: System) -> System:
    """Keep as many tokens mapped past a row's end as its kernel may touch, unless the user says how many."""
    if not hasattr(system.allocator, "read_past") or system.allocator.read_past is not None:
        return system
    return replace(system, allocator=replace(system.allocator, read_past=kernel_spec(system.kernel.name).reads_past))


def kept(listed: Sequence[str], allocator: str, kernel: str) -> list[DictConfig]:
    """The system files that `allocator=` and `kernel=` keep.

    Where both are named and no listed system is that pair, the pair runs all the same. Raises UserError where
    nothing is left of an experiment's systems; one that compares none lists none.
    """
    if not listed and allocator == kernel == ALL:
        return []
    files = [_read(name) for name in listed]
    matching = [s for s in files if allocator in (ALL, s.allocator.name) and kernel in (ALL, s.kernel.name)]
    if matching:
        return matching
    if ALL not in (allocator, kernel):
        pair = {"allocator": {"name": allocator}, "kernel": {"name": kernel}}
        return [OmegaConf.create({"name": f"{allocator}-{kernel}", "pairing": "best of each", **pair})]
    used = ", ".join(f"{s.name} ({s.allocator.name} + {s.kernel.name})" for s in files)
    raise UserError(
        f"allocator={allocator} kernel={kernel}: no system of this experiment uses that. "
        f"Its systems: {used}. Name both an allocator and a kernel to run another pair."
    )


def _read(name: str) -> DictConfig:
    if name not in names("system"):
        raise UserError(f"systems: no such system {name!r}. There are: {', '.join(names('system'))}")
    config = load("system", name)
    unknown = [str(key) for key in config if key not in _KEYS]
    if unknown:
        raise no_such_key(f"conf/system/{name}.yaml: {unknown[0]}", _KEYS)
    if config.pairing not in PAIRINGS:
        raise UserError(f"conf/system/{name}.yaml: pairing {config.pairing!r} is none of {', '.join(PAIRINGS)}")
    config.name = name
    return config


def build(
    file: DictConfig,
    scheduler: DictConfig,
    overrides: Sequence[str],
    as_config: Callable[[str, str, DictConfig], Any],
) -> System:
    """A system from its file. Fields: group file, then system file, then command line; the last one wins.

    `as_config(group, name, node)` turns a node into its dataclass.
    """
    parts = {}
    published = file.get("published")
    for group in ("allocator", "kernel"):
        name = file[group].name
        as_filed = OmegaConf.merge(load(group, name), file[group])
        node = DictConfig(OmegaConf.merge(as_filed, fields_set(group, overrides)))
        parts[group] = as_config(group, name, node)
        if node != as_filed:
            published = None  # the paper's system had other fields
    policy = load("scheduler", file.scheduler) if file.get("scheduler") else scheduler
    return System(
        name=file.name,
        scheduler=as_config("scheduler", policy.name, policy),
        pairing=file.pairing,
        published=published,
        variant=file.get("variant"),
        **parts,
    )
