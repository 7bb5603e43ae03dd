"""Systems: which files a command keeps, what they are called, and whose fields win."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from kvarena.allocators import registry as allocators
from kvarena.allocators.reservation.static import StaticPolicy
from kvarena.errors import UserError
from kvarena.experiments.command import compose
from kvarena.experiments.command.compose import compose_run
from kvarena.harness import config
from kvarena.harness.config import load, names, typed
from kvarena.harness.paths import CONF
from kvarena.harness.run.run import Run
from kvarena.harness.run.schemas import of
from kvarena.harness.run.systems import System, as_filed, described, distinct, kept, said

Add = Callable[[str, str], None]
NUMBA = ["static-numba", "paged-numba"]


@dataclass
class SlabConfig:
    """A newcomer's."""

    name: str = "slab"
    unit: int = 64
    classes: list[int] = field(default_factory=lambda: [1, 2])


class SlabPolicy(StaticPolicy):
    """One that has no file in conf/."""

    name = "slab"


@pytest.fixture
def newcomer() -> Iterator[None]:
    allocators.allocator(SlabConfig())(SlabPolicy)
    yield
    allocators._POLICIES.pop("slab")


@pytest.fixture
def own_conf(newcomer: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Add:
    """`own_conf("system/slab-numba", text)` adds a file to a conf/ of the test's own."""
    folder = tmp_path / "conf"
    shutil.copytree(CONF, folder)
    for module in (config, compose):
        monkeypatch.setattr(module, "CONF", folder)
    return lambda name, text: (folder / f"{name}.yaml").write_text(text) and None


def filed(name: str) -> System:
    return as_filed(name, typed(of("scheduler", "vllm"), load("scheduler", "vllm"), "scheduler"))


def of_kind(allocator: Any) -> System:
    return replace(filed("static-numba"), allocator=allocator, variant=None)


def served(*overrides: str) -> Run:
    return compose_run("experiment=memory_waste", *overrides)


@pytest.mark.parametrize("name", [n for n in names("allocator") if n != "all"])
def test_an_allocator_as_filed_is_described_by_its_name_alone(name: str) -> None:
    assert described(typed(of("allocator", name), load("allocator", name), "allocator")) == name


def test_what_differs_from_the_defaults_is_said(newcomer: None) -> None:
    paged = filed("paged").allocator
    assert described(replace(paged, block_size=32)) == "paged{block_size: 32}"
    assert described(SlabConfig()) == "slab", "a default that is a list"
    assert described(SlabConfig(unit=32, classes=[3])) == "slab{unit: 32, classes: [3]}"
    assert said("paged{block_size: 32}", {"watermark": 0}) == "paged{block_size: 32, watermark: 0}"
    assert said("vattention-64KB", {"page_group": "64KB"}) == "vattention-64KB{page_group: 64KB}"
    assert said("paged, orca", {"watermark": 0}) == "paged, orca{watermark: 0}"
    assert said("paged{block_size: 32}", {}) == "paged{block_size: 32}"


def test_systems_that_would_be_called_alike_are_told_apart_by_scheduler_else_by_name() -> None:
    one = filed("paged-numba")
    orca = replace(one, name="b", scheduler=filed("orca-max").scheduler)
    apart = distinct([one, orca], by_kernel=True)
    assert [s.label for s in apart] == ["paged, vllm/numba", "paged, orca/numba"]
    assert [s.label for s in distinct([one, replace(one, name="b")], by_kernel=True)] == [
        "paged, paged-numba/numba", "paged, b/numba",
    ]  # fmt: skip
    gather = replace(one, name="g", kernel=filed("paged-gather").kernel)
    assert [s.label for s in distinct([one, gather], by_kernel=True)] == ["paged/numba", "paged/gather_sdpa"]
    assert len({s.shown_allocator for s in distinct([one, gather], by_kernel=False)}) == 2


def test_systems_that_the_command_line_made_alike_are_one() -> None:
    own = served("systems=[vattention-64kb,vattention-2mb,paged]")
    assert [s.name for s in own.systems] == ["vattention-64kb", "vattention-2mb", "paged"]
    made = served("systems=[vattention-64kb,vattention-2mb,paged]", "allocator=vattention", "allocator.page_group=2MB")
    assert [(s.name, s.shown_allocator) for s in made.systems] == [("vattention-64kb", "vattention")]
    assert [s.name for s in served("systems=[paged,paged-numba]").systems] == ["paged", "paged-numba"], "as asked for"


def test_kept_are_the_listed_then_the_filed_then_the_pair() -> None:
    assert [s.name for s in kept(NUMBA, "all", "all")] == NUMBA
    assert [s.name for s in kept(NUMBA, "paged", "all")] == ["paged-numba"]
    assert {s.allocator.name for s in kept(NUMBA, "vattention", "all")} == {"vattention"}
    assert {s.kernel.name for s in kept(NUMBA, "vattention", "all")} == {"numba"}
    assert [s.name for s in kept(NUMBA, "contiguous", "sdpa")] == ["contiguous-sdpa"]
    assert kept([], "all", "all") == []
    with pytest.raises(UserError, match="Name both"):
        kept(NUMBA, "all", "sdpa")


def test_a_pair_has_the_first_kernel_that_reads_the_allocator() -> None:
    listed = ["paged-vllm-kernel", "paged-fa2"]
    assert [s.name for s in kept(listed, "contiguous", "all")] == ["contiguous-fa2"]
    assert [s.name for s in kept(listed, "paged_reserved", "all")] == ["paged_reserved-vllm_paged"]


def test_a_system_file_of_ones_own_is_kept_by_its_allocator(own_conf: Add) -> None:
    """What CONTRIBUTING promises."""
    assert [s.name for s in kept(NUMBA, "slab", "all")] == ["slab-numba"], "no file: the experiment's kernel"
    own_conf("system/slab-sdpa", "allocator: {name: slab, unit: 32}\nkernel: {name: sdpa}\npairing: same library\n")
    assert [s.pairing for s in kept(NUMBA, "slab", "sdpa")] == ["same library"], "the file, not the bare pair"
    assert [s.name for s in kept(["paged-gather"], "slab", "all")] == ["slab-sdpa"], "gather_sdpa cannot read rows"
    own_conf("system/slab-first", "allocator: {name: slab, unit: 16}\nkernel: {name: numba}\npairing: same body\n")
    assert [s.name for s in kept(NUMBA, "slab", "all")] == ["slab-first"]
    own_conf("system/slab-odd", "allocator: {name: slab}\nkernel: {name: numba}\nkernal: x\npairing: same body\n")
    with pytest.raises(UserError, match=r"slab-odd\.yaml: kernal"):
        kept(NUMBA, "slab", "all")


def test_a_newcomer_runs_by_name_and_its_fields_win(newcomer: None) -> None:
    (system,) = served("allocator=slab").systems
    assert (system.name, system.allocator, system.shown_allocator) == ("slab-numba", SlabConfig(), "slab")
    (system,) = served("allocator=slab", "allocator.unit=32").systems
    assert (system.allocator.unit, system.shown_allocator) == (32, "slab{unit: 32}")


def test_as_filed_is_the_file_with_the_given_scheduler_where_it_names_none() -> None:
    orca = filed("orca-max").scheduler
    assert as_filed("static-numba", orca).scheduler is orca
    assert as_filed("orca-max", filed("static-numba").scheduler).scheduler.name == "orca"
    assert as_filed("vattention-64kb", orca).allocator.page_group == "64KB"


def test_a_scheduler_that_is_named_is_every_systems() -> None:
    mine = {s.name: s.scheduler.name for s in served().systems}
    assert set(mine.values()) == {"orca", "vllm"}
    assert {s.scheduler.name for s in served("scheduler=orca").systems} == {"orca"}


def test_a_field_of_a_scheduler_is_set_wherever_there_is_one() -> None:
    for key, value in (("max_seqs", 8), ("preemption", "swap")):
        for system in served(f"scheduler.{key}={value}").systems:
            assert getattr(system.scheduler, key, value) == value
        assert any(hasattr(s.scheduler, key) for s in served(f"scheduler.{key}={value}").systems)


def test_a_field_that_no_scheduler_of_the_run_has_is_refused() -> None:
    with pytest.raises(UserError, match=r"scheduler\.preemption.*orca"):
        served("systems=[orca-max]", "scheduler.preemption=swap")


@pytest.mark.parametrize("allocator", ["paged", "vattention", "static", "orca_max", "contiguous", "paged_reserved"])
def test_padded_batches_need_a_policy_that_pads(allocator: str) -> None:
    with pytest.raises(UserError, match=f"scheduler=fastertransformer.*{allocator}"):
        served(f"allocator={allocator}", "scheduler=fastertransformer", "engine=lean")


def test_a_policy_that_pads_runs_with_every_scheduler() -> None:
    for scheduler in names("scheduler"):
        (system,) = served("allocator=fastertransformer", f"scheduler={scheduler}", "engine=lean").systems
        assert system.scheduler.name == scheduler


@pytest.mark.parametrize("variant", ["vLLM", "orca_max"])
def test_a_file_may_not_call_its_system_by_anothers_name(own_conf: Add, variant: str) -> None:
    own_conf(
        "system/mine", f"allocator: {{name: paged}}\nkernel: {{name: numba}}\npairing: same body\nvariant: {variant}\n"
    )
    with pytest.raises(UserError, match="must begin with its allocator, paged"):
        served("systems=[mine]")
