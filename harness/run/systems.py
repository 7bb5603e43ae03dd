"""Systems: what an experiment compares. An allocator, a kernel and a scheduling policy under one name."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, replace
from typing import Any, ClassVar, Protocol

from kvarena.allocators.options import option
from kvarena.allocators.registry import memory_layout, preset
from kvarena.kernels.registry import kernel_spec


class Options(Protocol):
    """A dataclass of options, another one for each allocator, kernel and scheduler."""

    @property
    def name(self) -> str:
        """Of the allocator, kernel or scheduler."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


@dataclass(frozen=True, slots=True)
class System:
    """One line of a comparison."""

    name: str
    allocator: Options
    kernel: Options
    scheduler: Options  # THE_RUNS while it is only stated (named_systems.py)
    pairing: str  # what a comparison with the others of that word isolates; only "same body" isolates the layout
    variant: str | None = None  # tells apart systems of one allocator: vattention-64KB

    @property
    def shown_allocator(self) -> str:
        """The allocator as labels have it."""
        return self.variant or self.allocator.name

    @property
    def attention_key(self) -> str:
        """The kernel and the layout it reads, as engines tell costs of attention apart: fa2/paged, fa2/contiguous."""
        return f"{self.kernel.name}/{memory_layout(self.allocator.name).value}"

    @property
    def label(self) -> str:
        """`<allocator>/<kernel>`."""
        return f"{self.shown_allocator}/{self.kernel.name}"


def described(allocator: Options, given: Collection[str] = ()) -> str:
    """An allocator by what it is: its name, and fields that are `given` or differ from the defaults of that name."""
    plain = asdict(preset(allocator.name))
    own = {name: value for name, value in asdict(allocator).items() if name in given or value != plain[name]}
    return said(allocator.name, own)


def said(shown: str, values: Mapping[str, object]) -> str:
    """A shown allocator with more of its fields: `vattention{page_group: 64KB}`."""
    words = ", ".join(f"{name}: {value}" for name, value in values.items())
    if not words:
        return shown
    return f"{shown[:-1]}, {words}}}" if shown.endswith("}") else f"{shown}{{{words}}}"


def slug(words: str) -> str:
    """Words as a part of a name, of which files are called."""
    return re.sub(r"[^\w.=+-]+", "-", words)


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


def unlike(systems: Sequence[System], stated: Sequence[System]) -> Iterator[System]:
    """The systems, without those that the command line made like an earlier one: as they were stated they differ."""
    for number, system in enumerate(systems):
        before = zip(systems[:number], stated, strict=False)
        if not any(alike(system, each) and not _stated_alike(stated[number], other) for each, other in before):
            yield system


def _stated_alike(one: System, other: System) -> bool:
    """Whether two are one system under two names, where one may leave the scheduler to the run."""
    scheduler = one.scheduler or other.scheduler
    return alike(replace(one, scheduler=scheduler), replace(other, scheduler=other.scheduler or scheduler))


def alike(one: System, other: System) -> bool:
    """Whether two systems are one in all but what they are called."""
    return (one.allocator, one.kernel, one.scheduler) == (other.allocator, other.kernel, other.scheduler)


def with_room_to_read(system: System) -> System:
    """Keep as many tokens mapped past a row's end as its kernel may touch, unless the user says how many."""
    if option(system.allocator, "read_past", 0) is not None:
        return system
    return replace(system, allocator=replace(system.allocator, read_past=kernel_spec(system.kernel.name).reads_past))
