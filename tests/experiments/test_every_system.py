"""Every experiment with every system that it accepts: one tiny cell each, its table, its figure and its rows.

Systems are those of the experiment's list, one of every other kind, and a newcomer's: the allocator and the kernel of
the README, which no table of colours, prices or names has heard of.
"""

import contextlib
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from tiny import TINY, Unwritten, default_systems, resolved

from kvarena.allocators import registry as allocators
from kvarena.errors import UserError
from kvarena.experiments.command import registry, show
from kvarena.experiments.command.carry_out import made_of, measure, summary_of
from kvarena.experiments.kit import plots
from kvarena.harness.paths import ROOT
from kvarena.harness.record.record import Outcome
from kvarena.harness.run.published import OURS
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System, distinct
from kvarena.harness.scheduler.registry import config_class as scheduler_config
from kvarena.kernels.catalogue import CATALOGUE
from kvarena.kernels.config import KernelConfig

OTHERS = (
    "static-numba", "paged", "contiguous", "paged-reserved", "fastertransformer", "vattention-2mb", "vattention-sliced",
    "paged-fa2", "vattention-fa2", "vattention-64kb-copied", "paged-gather",
)  # fmt: skip
NO_SYSTEMS = (
    "attention_kernel",
    "block_size_kernel",
    "portability",
    "vmm_api_latency",
    "allocation_bandwidth",
    "trace_lengths",
)
UNITS = {"granularity": ("params.block_sizes", "params.page_groups")}  # refused where no system of a run has such
PAIRS = [pair for pair in TINY if pair[0] not in NO_SYSTEMS]


def readme(heading: str) -> dict[str, Any]:
    section = (ROOT / "README.md").read_text().split(f"## {heading}", 1)[1].split("\n## ", 1)[0]
    names: dict[str, Any] = {"__name__": "newcomers"}
    exec(compile(section.split("```python\n")[1].split("```")[0], "README.md", "exec"), names)
    return names


@pytest.fixture(scope="module", autouse=True)
def newcomers() -> Iterator[None]:
    """The README's allocator and kernel, as if somebody had just written them."""
    module = types.ModuleType("newcomers")
    vars(module).update(readme("Your own allocator") | readme("Your own kernel"))
    sys.modules["newcomers"] = module
    allocators.allocator(module.HeadroomConfig())(module.HeadroomPolicy)
    CATALOGUE["plain"] = (module.PlainAttention.spec, "newcomers", "PlainAttention")
    yield
    allocators._POLICIES.pop("headroom")
    CATALOGUE.pop("plain")
    sys.modules.pop("newcomers")


def newcomer(allocator: str, kernel: str) -> System:
    options, scheduler = allocators.config_class(allocator)(), scheduler_config("vllm")(name="vllm")
    if allocator == "paged":
        options = replace(options, block_size=32)  # another system than the one of the list
    return System(f"new-{allocator}", options, KernelConfig(kernel), scheduler, "best of each")


@pytest.mark.parametrize(("experiment", "clock"), PAIRS)
def test_all_systems_and_newcomers_side_by_side(
    experiment: str, clock: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = resolved(experiment, clock, f"systems=[{','.join(default_systems(experiment, clock))}]")
    kernel = "plain" if clock == "measured" else run.systems[0].kernel.name
    new = [newcomer("headroom", kernel), newcomer("paged", kernel)]
    outcome = None
    with contextlib.suppress(UserError):  # those that compare one system, or change a unit that it has not
        outcome = outcome_of(replace(run, systems=distinct((*run.systems, *new), by_kernel=clock == "measured")))
        assert "headroom" in set(outcome.summary.allocator)
        assert plots.colour_of("headroom") not in plots.COLOURS.values()
    check(outcome or outcome_of(run), capsys)


@pytest.mark.parametrize(("experiment", "clock"), [pair for pair in PAIRS if pair[1] == "modelled"])
def test_every_system_alone_runs_or_is_refused(experiment: str, clock: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows and table of each; the figure of the last of the list, which is the one that no paper has."""
    own, accepted = default_systems(experiment, clock), set()
    for name in dict.fromkeys((*own, *OTHERS)):
        with contextlib.suppress(UserError):
            run = resolved(experiment, clock, f"systems=[{name}]", without=UNITS.get(experiment, ()))
            measured = measure(run, Unwritten())
            check_rows(Outcome(measured, summary_of(run, measured.frames), registry.get(experiment).HEADLINE), capsys)
            accepted.add(name)
            if name == own[-1]:
                check(made_of(run, measured), capsys)
    assert accepted >= set(own) - set(BESIDE.get(experiment, ())), "what is listed by default is accepted alone"


# Systems that an experiment takes only beside another: it swaps the blocks of one, or calibrates it.
BESIDE = {
    "preemption": ("vattention-64kb", "vattention-sliced-2mb", "vattention-2mb"), "calibrate": ("orca-oracle",),
}  # fmt: skip


def outcome_of(run: Run) -> Outcome:
    return made_of(run, measure(run, Unwritten()))


def check(outcome: Outcome, capsys: pytest.CaptureFixture[str]) -> None:
    """The rows name what ran, the table has them, and the figure's labels and colours tell the systems apart."""
    check_rows(outcome, capsys)
    told_apart(outcome.figure)


def check_rows(outcome: Outcome, capsys: pytest.CaptureFixture[str]) -> None:
    rows = outcome.summary
    assert not rows.drop(columns=["x", "value", "ci_low", "ci_high"]).isna().any(axis=None)
    assert not rows.astype(str).isin(["None", "nan/nan", ""]).drop(columns=["x", "ci_low", "ci_high"]).any(axis=None)
    ours = rows[rows.paper == OURS]
    assert (ours.panel == ours.setup).all()
    assert (ours.system == ours.label).all()
    capsys.readouterr()
    show.outcome(outcome, Path("there"))
    printed = capsys.readouterr().out
    headline = rows[rows.quantity.str.partition(":")[0] == outcome.headline]
    squeezed = "".join(printed.split())
    for name in headline.system:
        assert "".join(name.split())[:12] in squeezed or name == "-"


def told_apart(figure: Figure) -> None:
    """No label twice in a legend, none that says nothing; of curves, no look twice under two names."""
    figure.draw_without_rendering()
    for axis in figure.axes:
        handles, labels = axis.get_legend_handles_labels()
        assert not {"None", "nan", ""} & set(labels), labels
        looks: dict[tuple[str, ...], str] = {}
        for handle, label in zip(handles, labels, strict=True):
            if hasattr(handle, "get_linestyle") and hasattr(handle, "get_marker"):
                colours = to_hex(handle.get_color()), to_hex(handle.get_markerfacecolor())
                look = (*colours, str(handle.get_linestyle()), str(handle.get_marker()))
                assert looks.setdefault(look, label) == label, (
                    f"{label} and {looks[look]} look alike in {axis.get_title()}"
                )
