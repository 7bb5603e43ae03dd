"""What the jobs of a multirun are: which of them are one run.

Jobs that differ in their systems alone (an allocator, a kernel, a scheduler, or fields of them) are one run of all
those systems: so these are measured as the systems of any run are, in turn, and whatever disturbs the machine disturbs
them all. Jobs that differ in seeds stay jobs, and their rows become one (`over_seeds.py`). All others stay apart.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass, replace
from typing import NamedTuple

from hydra import compose
from hydra.core.override_parser.types import Override

from kvarena.experiments.command import registry
from kvarena.experiments.command.paths import parsed
from kvarena.experiments.kit.seeds import Seeded
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System, alike, distinct, said, slug

OF_SYSTEMS = ("systems", "allocator", "kernel", "scheduler")
SEEDS = ("trace.seed", "arrival.seed")  # of jobs that become one row; params.seeds are one run's


class Jobs(NamedTuple):
    """The jobs of a multirun: `across`, which Hydra runs one after the other, times those `within` each of them."""

    across: list[str]  # overrides as they were written
    within: list[list[str]]  # overrides of each run that may be one with the others; empty: none may

    @property
    def all(self) -> Iterator[list[str]]:
        """The overrides of every job."""
        for outer, inner in itertools.product(_expanded(self.across), self.within or [[]]):
            yield [*outer, *inner]


def jobs_of(arguments: Sequence[str]) -> Jobs:
    """Expand what is swept. With flags or plugins of Hydra's own (a launcher, a sweeper) all jobs are left to Hydra.

    Raises UserError for what is no override.
    """
    overrides = parsed([a for a in arguments if not a.startswith("-")])
    inner = [o for o in overrides if _is_within(o)]
    hydras = any(o.key_or_group.startswith("hydra/") or _is_range_of_reals(o) for o in overrides)
    if hydras or len(overrides) < len(arguments) or not any(o.is_sweep_override() for o in inner):
        return Jobs([str(o.input_line) for o in overrides], [])
    outer = [str(o.input_line) for o in overrides if o not in inner]
    return Jobs(outer, [list(job) for job in itertools.product(*map(_choices, inner))])


def _is_range_of_reals(override: Override) -> bool:
    """`interval(0, 1)`: only a sweeper of one's own takes it."""
    return bool(override.is_sweep_override() and not override.is_discrete_sweep())


def _is_within(override: Override) -> bool:
    key = override.key_or_group
    return key.partition(".")[0] in OF_SYSTEMS or key == "params.seeds"


def _choices(override: Override) -> list[str]:
    """One override for each value that it sweeps over."""
    if not override.is_sweep_override() or _is_range_of_reals(override):
        return [str(override.input_line)]
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def _expanded(overrides: Sequence[str]) -> Iterator[tuple[str, ...]]:
    return itertools.product(*map(_choices, parsed(overrides)))


def runs_within(overrides: Sequence[str], within: Sequence[Sequence[str]]) -> list[Run[object]]:
    """The runs of one job of Hydra's, inside of it. Raises UserError as any run does."""
    jobs = [[*overrides, *inner] for inner in within]
    return [registry.resolved(compose("config", job), job) for job in jobs]


def as_one(runs: Sequence[Run[object]], within: Sequence[Sequence[str]]) -> Run[object] | None:
    """The run of all systems of these runs; None where they are not of one kind, or cannot stand in one run."""
    first = runs[0]
    if len(runs) == 1:
        return first
    if len({str(_apart_from_systems(run)) for run in runs}) > 1 or first.experiment in registry.ONE_SYSTEM:
        return None
    systems = list(_united(runs, within))
    if _speaks_of(first, {s.name for run in runs for s in run.systems} - {s.name for s in systems}):
        return None
    by_kernel = first.clock == "measured" or bool(first.engine.attention)
    given = tuple(dict.fromkeys(key for run in runs for key in run.given))
    return replace(first, systems=distinct(systems, by_kernel), params=_with_all_seeds(runs), given=given)


def _apart_from_systems(run: Run[object]) -> dict[str, object]:
    plain = run.plain()
    params = {key: value for key, value in plain.pop("params").items() if key != "seeds"}
    return {**plain, "systems": None, "params": params}


def _with_all_seeds(runs: Sequence[Run[object]]) -> object:
    params = runs[0].params
    if not (isinstance(params, Seeded) and is_dataclass(params)):
        return params
    each = [run.params for run in runs]
    seeds = dict.fromkeys(seed for params in each if isinstance(params, Seeded) for seed in params.seeds)
    return replace(params, seeds=list(seeds))


def _speaks_of(run: Run[object], names: set[str]) -> bool:
    """Whether its parameters speak of systems by these names, which they have no more."""
    words = set(re.findall(r"[\w.=+-]+", str(run.plain()["params"])))
    return bool(words & names)


def _united(runs: Sequence[Run[object]], within: Sequence[Sequence[str]]) -> Iterator[System]:
    """Every system once, said with what was swept where the sweep changes it."""
    values = [_assignments(inner) for inner in within]
    swept = [key for key in values[0] if len({each[key] for each in values}) > 1]
    seen: list[System] = []
    for run, own in zip(runs, values, strict=True):
        for system in run.systems:
            if any(alike(system, each) for each in seen):
                continue
            seen.append(system)
            others = (each for other in runs for each in other.systems if each.name == system.name)
            kept = all(alike(system, each) for each in others)
            yield system if kept else _said(system, {key: own[key] for key in swept})


def _assignments(overrides: Sequence[str]) -> dict[str, str]:
    return {key.lstrip("+~"): value for key, _, value in (override.partition("=") for override in overrides)}


def _said(system: System, values: dict[str, str]) -> System:
    """A system whose name and label say what was swept of it."""
    variant = system.shown_allocator
    of_allocator = [key.partition(".")[2] for key in values if key.startswith("allocator.")]
    unsaid = [field for field in of_allocator if f"{field}: " not in variant]
    variant = said(variant, {field: getattr(system.allocator, field) for field in unsaid})
    others = {key: value for key, value in values.items() if key.startswith("scheduler")}
    variant = f"{variant} [{_words(others)}]" if others else variant
    return replace(system, name=f"{system.name}-{slug(_words(values))}", variant=variant)


def _words(values: dict[str, str]) -> str:
    return ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in values.items() if key != "systems")
