"""Systems by name: what `systems=` may say.

    paged/fa3                             a pair: allocator/kernel
    vattention/fa2{page_group: 64KB}      with options of the allocator, which differ from its defaults
    paged-fa3                             the pair as results call it
    vattention-64kb                       a name of conf/systems.yaml, which may say more; it may have options too

A pair whose results' name stands in conf/systems.yaml is the system there: paged/fa2 has blocks of 256.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from typing import Any, cast

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from kvarena.allocators.registry import allocator_names, memory_layout, preset
from kvarena.errors import UserError
from kvarena.harness.config import ALL, fields_set, load, parsed, typed
from kvarena.harness.paths import CONF
from kvarena.harness.run import schemas
from kvarena.harness.run.systems import Options, System, described, slug
from kvarena.harness.scheduler.registry import check_pair
from kvarena.kernels.config import KernelConfig
from kvarena.kernels.registry import fits, kernel_names, kernel_spec, pairing

EXAMPLES = "paged/fa2 or 'vattention/fa2{page_group: 64KB}'"
THE_RUNS = cast(Options, None)  # the scheduler of a system that states none, until it is one of a run


@dataclass
class Entry:
    """What a line of conf/systems.yaml may say."""

    pair: str = MISSING
    scheduler: str | None = None
    variant: str | None = None


@cache  # asked for every row of a summary; nobody changes what it returns
def stated(text: str) -> System:
    """The system that a name or a pair states; its scheduler is THE_RUNS where the run's is meant.

    Raises UserError for what does not exist, with what does.
    """
    called, options = _parts(text)
    system = _entry_or_pair(called)
    return _with_options(system, options, text) if options else system


def system_names() -> list[str]:
    """Names of conf/systems.yaml. Every pair is a system beside them."""
    return sorted(parsed(CONF / "systems.yaml"))


def there_are() -> str:
    """What may be written, for refusals."""
    return f"There are: {', '.join(system_names())}; and every pair ALLOCATOR/KERNEL, such as {EXAMPLES}"


def _parts(text: str) -> tuple[str, dict[str, Any]]:
    """`called{options}`, taken apart. Raises UserError for options that are not written like that."""
    called, brace, written = text.strip().partition("{")
    if not brace:
        return called, {}
    try:
        options = OmegaConf.to_container(OmegaConf.create(re.sub(r":(?=\S)", ": ", brace + written)))
    except (YAMLError, OmegaConfBaseException, ValueError):
        options = None
    if not isinstance(options, dict) or (None in options.values() and "null" not in written):
        raise UserError(f"systems: {text}: options of the allocator are written as in {EXAMPLES}")
    return called.strip(), {str(key): value for key, value in options.items()}


def _entry_or_pair(called: str) -> System:
    allocator, slash, kernel = called.partition("/")
    name = _dashed(f"{allocator}-{kernel}") if slash else called
    if name in system_names():
        return _entry(name)
    if not slash:
        pairs = ((a, k) for a in allocator_names() for k in kernel_names() if _dashed(f"{a}-{k}") == name)
        allocator, kernel = next(pairs, ("", ""))
        if not kernel:
            raise UserError(f"systems: no such system {called!r}. {there_are()}")
    return _pair(allocator, kernel)


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _pair(allocator: str, kernel: str) -> System:
    spec = kernel_spec(kernel)
    return System(_dashed(f"{allocator}-{kernel}"), preset(allocator), KernelConfig(spec.name), THE_RUNS, pairing(spec))


def _entry(name: str) -> System:
    """A system of conf/systems.yaml."""
    where = f"conf/systems.yaml: {name}"
    entry: Entry = typed(Entry, parsed(CONF / "systems.yaml")[name], where)
    called, options = _parts(entry.pair)
    allocator, _, kernel = called.partition("/")
    system = _with_options(_pair(allocator, kernel), options, where)
    if entry.variant is not None and not entry.variant.startswith(allocator):
        raise UserError(f"{where}: variant {entry.variant!r} must begin with its allocator, {allocator}")
    scheduler = _scheduler(load("scheduler", entry.scheduler)) if entry.scheduler else THE_RUNS
    return replace(system, name=name, scheduler=scheduler, variant=entry.variant)


def _with_options(system: System, options: dict[str, Any], where: str) -> System:
    """A system with other options of its allocator, which its name and its label say."""
    there = [field.name for field in fields(system.allocator) if field.name != "name"]
    for key in (key for key in options if key not in there):
        raise UserError(f"systems: {where}: {system.allocator.name} has no option {key}. There are: {', '.join(there)}")
    try:
        allocator = typed(type(system.allocator), asdict(system.allocator) | options, "allocator")
    except UserError as error:
        raise UserError(f"systems: {where}: {error}") from error
    said = "-".join(slug(f"{key}={getattr(allocator, key)}") for key in options)
    return replace(system, name=f"{system.name}-{said}", allocator=allocator, variant=described(allocator, options))


def as_filed(text: str, scheduler: Options) -> System:
    """The system that a name or a pair states, nothing changed; `scheduler` where it states none."""
    system = stated(text)
    return replace(system, scheduler=scheduler) if system.scheduler is THE_RUNS else system


def kept(listed: Sequence[str], allocator: str, kernel: str) -> list[System]:
    """The systems that `allocator=` and `kernel=` keep of those listed, as they are stated.

    Where that leaves none: the pair of both, or of the allocator and the first kernel listed that can read it. Raises
    UserError where a kernel alone leaves none, and for a system that is listed twice.
    """
    if other := [text for text in listed if not isinstance(text, str | int)]:
        raise UserError(f"systems: {other[0]}: is no name of a system. {there_are()}")
    systems = [stated(str(text)) for text in listed]
    names = [system.name for system in systems]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"systems: {', '.join(twice)} is listed twice; two names of one system may stand side by side")
    matching = [s for s in systems if allocator in (ALL, s.allocator.name) and kernel in (ALL, s.kernel.name)]
    if matching or (not listed and allocator == kernel == ALL):
        return matching
    kernels = [kernel] if kernel != ALL else list(dict.fromkeys(s.kernel.name for s in systems))
    if allocator == ALL or not kernels:
        used = ", ".join(f"{s.name} ({s.allocator.name} + {s.kernel.name})" for s in systems)
        raise UserError(
            f"allocator={allocator} kernel={kernel}: no system of this experiment uses that. "
            f"Its systems: {used}. Name both an allocator and a kernel to run another pair."
        )
    reading = [name for name in kernels if fits(kernel_spec(name), memory_layout(allocator)) is None]
    return [_usual(allocator, (reading or kernels)[0])]


def check_written_once(listed: Sequence[str], allocator: str, overrides: Sequence[str]) -> None:
    """Raises UserError for an option that braces and the command line both set: one would go without a word."""
    given = {str(key) for key in fields_set("allocator", overrides)}
    for text in listed:
        twice = sorted(given & _parts(str(text))[1].keys())
        if twice and stated(str(text)).allocator.name == allocator:
            raise UserError(f"allocator.{twice[0]}: is written in systems too, in {text}; write it once")


def _usual(allocator: str, kernel: str) -> System:
    """The pair; where it has one, the system that is called like the allocator, which has its scheduler too."""
    name = _dashed(allocator)
    if name in system_names() and (usual := stated(name)).kernel.name == kernel:
        return usual
    return stated(f"{allocator}/{kernel}")


def build(system: System, scheduler: DictConfig, overrides: Sequence[str]) -> System:
    """A system as it is stated, with the fields that the command line names.

    `scheduler` is the run's, for a system that states none; `scheduler=NAME` on the command line is for all. Raises
    UserError for fields that it does not have, and for an allocator that the scheduler cannot drive.
    """
    allocator = _changed(system.allocator, "allocator", fields_set("allocator", overrides))
    asked = any(override.startswith("scheduler=") for override in overrides)
    policy = _scheduler(scheduler) if asked or system.scheduler is THE_RUNS else system.scheduler
    limits = fields_set("scheduler", overrides)
    own = {str(key): value for key, value in limits.items() if hasattr(policy, str(key))}  # others: other systems'
    check_pair(policy.name, allocator.name)
    return replace(
        system,
        allocator=allocator,
        kernel=_changed(system.kernel, "kernel", fields_set("kernel", overrides)),
        scheduler=_changed(policy, "scheduler", own),
        variant=system.variant if allocator == system.allocator else described(allocator),
    )


def _scheduler(node: DictConfig) -> Options:
    config: Options = typed(schemas.of("scheduler", node.name), node, "scheduler")
    return config


def _changed(config: Options, group: str, given: Mapping[Any, Any]) -> Options:
    return typed(type(config), OmegaConf.merge(asdict(config), given), group)
