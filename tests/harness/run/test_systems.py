"""Systems: what a name or a pair states, which a command keeps, what they are called, and whose fields win."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from kvarena.allocators import registry as allocators
from kvarena.allocators.options import option
from kvarena.allocators.registry import memory_layout, preset
from kvarena.allocators.reservation.static import StaticPolicy
from kvarena.errors import UserError
from kvarena.experiments.command.compose import compose_run
from kvarena.harness.config import load, names, typed
from kvarena.harness.paths import CONF
from kvarena.harness.run import named_systems
from kvarena.harness.run.named_systems import as_filed, kept, stated, system_names
from kvarena.harness.run.run import Run
from kvarena.harness.run.schemas import of
from kvarena.harness.run.systems import System, described, distinct, said
from kvarena.kernels.registry import fits, kernel_spec

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
    """`own_conf("slab-first", "{pair: slab/sdpa}")` adds a line to a conf/systems.yaml of the test's own."""
    file = tmp_path / "systems.yaml"
    file.write_text((CONF / "systems.yaml").read_text())
    monkeypatch.setattr(named_systems, "CONF", tmp_path)
    monkeypatch.setattr(named_systems, "parsed", lambda path: OmegaConf.to_container(OmegaConf.load(path)))
    monkeypatch.setattr(named_systems, "stated", named_systems.stated.__wrapped__)
    return lambda name, line: file.write_text(f"{file.read_text()}{name}: {line}\n") and None


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


@pytest.mark.parametrize("name", system_names())
def test_a_line_of_the_file_says_more_than_its_pair_and_fits(name: str) -> None:
    system = stated(name)
    plain = System(system.name, preset(system.allocator.name), system.kernel, None, system.pairing)
    assert system != plain or name != f"{system.allocator.name}-{system.kernel.name}"
    layout, block_size = memory_layout(system.allocator.name), getattr(system.allocator, "block_size", None)
    assert fits(kernel_spec(system.kernel.name), layout, block_size=block_size) is None


def test_a_pair_is_the_system_that_its_name_is() -> None:
    assert stated("paged/fa3") == stated("paged-fa3")
    assert stated("paged/fa2") == stated("paged-fa2")
    assert stated("paged/fa2").allocator.block_size == 256
    assert (stated("orca_max/flash_attn").name, stated("orca_max/flash_attn").variant) == ("orca-max-flash-attn", None)
    assert {stated(f"{a}/triton").pairing for a in ("static", "paged", "vattention")} == {"same body"}
    assert stated("paged/fa2").pairing == "same library"


@pytest.mark.parametrize(
    "written", ["vattention/fa2{page_group: 64KB, overlap: false}", " vattention-fa2{page_group:64KB,overlap:false} "]
)
def test_options_in_braces_are_the_allocators(written: str) -> None:
    system = stated(written)
    assert (system.allocator.page_group, system.allocator.overlap) == ("64KB", False)
    assert system.name == "vattention-fa2-page_group=64KB-overlap=False", "names of files are made of it"
    assert system.label == "vattention{page_group: 64KB, overlap: False}/fa2"
    assert stated("vattention-64kb{overlap: false}").shown_allocator == "vattention{page_group: 64KB, overlap: False}"
    assert stated("vattention/fa2{read_past: null}").label == "vattention{read_past: None}/fa2"
    assert stated("vattention/fa2{page_group: 2MB}").allocator == stated("vattention/fa2").allocator


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("paged/numba{page_group: 2MB}", "paged has no option page_group.*block_size"),
        ("paged/numba{name: static}", "paged has no option name"),
        ("paged/numba{block_size}", "written as in"),
        ("paged/numba{block_size=8}", "written as in"),
        ("paged/numba{block_size: 8", "written as in"),
        ("paged/numba{block_size: soon}", r"allocator\.block_size"),
        ("paged/numba{block_size: 0}", r"allocator\.block_size"),
        ("paged/nunba", "kernel=nunba: no such kernel.*numba"),
        ("pagd/numba", "allocator=pagd: no such allocator.*paged"),
        ("paged-nunba", "no such system.*vattention-64kb.*ALLOCATOR/KERNEL"),
    ],
)
def test_what_no_system_is_is_refused(written: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        stated(written)


QUOTED = "vattention/numba{page_group: 2MB, overlap: false}"


@pytest.mark.parametrize("pair", [f'"{QUOTED}"', f"'{QUOTED}'", QUOTED, QUOTED.replace(": ", ":")])
def test_options_are_written_with_or_without_quotes(pair: str) -> None:
    systems = served(f"systems=[paged/numba, {pair}]").systems
    assert [s.name for s in systems] == ["paged-numba", "vattention-numba-page_group=2MB-overlap=False"]


@pytest.mark.parametrize(
    ("systems", "said"),
    [
        ("[paged/numba{block_size: {a: 8}}]", "written as in 'systems="),
        ("[paged/numba{block_size: 8]", "written as in 'systems="),
        ("[paged/numba,paged-numba]", "paged-numba is listed twice"),
        ("[[paged/numba]]", "is no name of a system"),
        ("[null]", "is no name of a system"),
    ],
)
def test_a_list_that_is_none_is_refused(systems: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        served(f"systems={systems}")


def test_an_option_is_written_in_braces_or_beside_them() -> None:
    written = ("systems=[paged/numba{block_size: 8},paged/numba]", "allocator=paged")
    with pytest.raises(UserError, match=r"allocator\.block_size: .*paged/numba\{block_size: 8\}"):
        served(*written, "allocator.block_size=32")
    assert [option(s.allocator, "block_size") for s in served(*written, "allocator.watermark=0.1").systems] == [8, 16]


def test_kept_are_the_listed_then_the_pair() -> None:
    assert [s.name for s in kept(NUMBA, "all", "all")] == NUMBA
    assert [s.name for s in kept(NUMBA, "paged", "all")] == ["paged-numba"]
    assert [s.name for s in kept(NUMBA, "vattention", "all")] == ["vattention"]
    assert [s.name for s in kept(NUMBA, "contiguous", "sdpa")] == ["contiguous-sdpa"]
    assert [s.scheduler.name for s in kept(NUMBA, "contiguous", "all")] == ["orca"], "what goes with it goes along"
    assert kept([], "all", "all") == []
    with pytest.raises(UserError, match="Name both"):
        kept(NUMBA, "all", "sdpa")


def test_a_pair_has_the_first_kernel_that_reads_the_allocator() -> None:
    listed = ["paged-vllm-kernel", "paged-fa2"]
    assert [s.name for s in kept(listed, "contiguous", "all")] == ["contiguous-fa2"]
    assert [s.name for s in kept(listed, "paged_reserved", "all")] == ["paged-reserved-vllm-paged"]


@pytest.mark.parametrize("pair", ["paged/sdpa", "static/gather_sdpa"])
@pytest.mark.parametrize("clock", ["modelled", "measured"])
def test_a_pair_that_cannot_read_one_another_is_refused_under_either_clock(pair: str, clock: str) -> None:
    with pytest.raises(UserError, match="paged \\+ numba"):
        compose_run("experiment=decode_throughput", f"clock={clock}", f"systems=[{pair}]")


def test_a_line_of_ones_own(own_conf: Add) -> None:
    assert [s.name for s in kept(NUMBA, "slab", "all")] == ["slab-numba"]
    own_conf("slab", "{pair: 'slab/numba{unit: 32}', scheduler: orca}")
    assert [(s.name, s.allocator.unit) for s in kept(NUMBA, "slab", "all")] == [("slab", 32)]
    own_conf("slab-odd", "{pair: slab/numba, kernal: x}")
    with pytest.raises(UserError, match=r"systems\.yaml: slab-odd\.kernal: no such key"):
        kept(["slab-odd"], "all", "all")


def test_a_newcomer_runs_by_name_and_its_fields_win(newcomer: None) -> None:
    (system,) = served("allocator=slab").systems
    assert (system.name, system.allocator, system.shown_allocator) == ("slab-numba", SlabConfig(), "slab")
    (system,) = served("allocator=slab", "allocator.unit=32").systems
    assert (system.allocator.unit, system.shown_allocator) == (32, "slab{unit: 32}")


def test_the_runs_scheduler_is_that_of_systems_that_name_none() -> None:
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
def test_a_line_may_not_call_its_system_by_anothers_name(own_conf: Add, variant: str) -> None:
    own_conf("mine", f"{{pair: paged/numba, variant: {variant}}}")
    with pytest.raises(UserError, match="must begin with its allocator, paged"):
        kept(["mine"], "all", "all")
