"""What mapping adds to a prefill, and what inherited rows save (vAttention Fig 13).

A prompt needs its page-groups before its one iteration, so nothing hides behind an iteration before it. Each way serves
two requests, the second when the first has ended, and times the prefill of the second:

    no VMM calls                  rows reserved at the start (static allocation)
    64KB sync, 2MB sync           the second maps all of its own, and finds nothing to unmap
    deferred reclamation          the second inherits the row of the first, which was as long (2 MB)
    64KB, inherited whole         the same with page-groups of 64 KB
    64KB, inherited half          the first was half as long
    64KB, reclaimed at once       what the first had is unmapped before the second maps its own
    64KB, one group ahead         a row with one page-group in every tensor is kept ready (eager allocation)

The paper has the first four. The GPUs of a model map side by side.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvarena.allocators.static import StaticConfig
from kvarena.experiments import plots
from kvarena.experiments.driver_calls import check_counts
from kvarena.experiments.mapping import on_gpus, the_system
from kvarena.experiments.replay import Replayer, columns
from kvarena.harness.model import load_preset
from kvarena.harness.progress import Progress
from kvarena.harness.record import Frames, Outcome, Recorder
from kvarena.harness.run import Run
from kvarena.harness.statistics import Estimate, median_interval
from kvarena.harness.step_model import PS_PER_S
from kvarena.harness.summary import SummaryRow, frame, published_values, row
from kvarena.harness.systems import System
from kvarena.harness.workload import Workload

NAME = "deferred_reclamation"


class Way(NamedTuple):
    """How the second request comes by its page-groups. `page_group` None: they are reserved at the start."""

    name: str
    page_group: str | None
    first: float = 0.0  # length of the first request over that of the second; 0: there is none
    deferred: bool = True
    eager: bool = False


PLAIN = Way("no VMM calls", None)
WAYS = (
    PLAIN,
    Way("64KB sync", "64KB", deferred=False),
    Way("2MB sync", "2MB", deferred=False),
    Way("deferred reclamation", "2MB", first=1),
    Way("64KB, inherited whole", "64KB", first=1),
    Way("64KB, inherited half", "64KB", first=0.5),
    Way("64KB, reclaimed at once", "64KB", first=1, deferred=False),
    Way("64KB, one group ahead", "64KB", deferred=False, eager=True),
)
PUBLISHED_WAYS = tuple(way.name for way in WAYS[:4])


@dataclass
class Params:
    """`params.*` of conf/experiment/deferred_reclamation.yaml; null there means: by the profile."""

    prompt_tokens: int = 0  # of the second request
    output_tokens: int = 4  # of the first
    pool_bytes: int | None = None
    rounds: int = 0
    gpus: dict[str, int] = field(default_factory=dict)  # modelled clock: model -> GPUs


HEADLINE = "mapping_time_over_rest"


def run(run: Run, recorder: Recorder) -> Outcome:
    """Time the second prefill in every way."""
    params: Params = run.params
    the_system(run)
    check_counts(params, "prompt_tokens", "output_tokens", "rounds")
    frames = []
    with Progress(NAME, len(params.gpus) or 1) as progress:
        for served in _runs(run):
            progress.stage(served.model.name)
            cell = recorder.cell(served.model.name, partial(_measure, served))
            frames.append((served, cell["samples"].assign(model=served.model.name)))
            progress.advance()
    summary = frame(r for served, samples in frames for r in _summary(served, samples))
    samples = pd.concat([table for _, table in frames], ignore_index=True)
    return Outcome(summary, pd.DataFrame({"model": []}), samples, HEADLINE, draw(summary))


def _runs(run: Run) -> Iterator[Run]:
    """The run with each of its models."""
    if run.clock == "measured":
        yield run
        return
    for name, gpus in (run.params.gpus or {run.model.name: run.model.tp}).items():
        yield replace(run, model=load_preset(name, tp=gpus))


def _measure(run: Run) -> Frames:
    """A sample of every way in each round; each round begins with another way."""
    longest = run.params.prompt_tokens + run.params.output_tokens
    if run.clock == "modelled":
        run = on_gpus(run, run.model.tp, longest)
    replayer, samples = Replayer(replace(run, trace=replace(run.trace, max_tokens=longest))), []
    for number in range(-1 if run.clock == "measured" else 0, run.params.rounds):
        turn = number % len(WAYS)
        for way in [*WAYS[turn:], *WAYS[:turn]]:
            second = _second_prefill(run, replayer, way)
            if number >= 0:  # the first round compiles what compiles once
                samples.append({"round": number, "way": way.name, **second})
    return {"samples": pd.DataFrame(samples)}


def _second_prefill(run: Run, replayer: Replayer, way: Way) -> dict[str, float]:
    params: Params = run.params
    prompts, outputs = np.array([*_before(way, params, run.clock), (params.prompt_tokens, 1)]).T
    served = replayer.serve(system_in(way, the_system(run)), Workload(prompts, outputs, 0 * prompts))
    prefill = served.steps[served.steps.prefills > 0].iloc[-1]
    return {"prefill_s": prefill.duration_ps / PS_PER_S, "mapping_s": prefill.stall_ps / PS_PER_S,
            "slabs": float(prefill.actions)}  # fmt: skip


def _before(way: Way, params: Params, clock: str) -> list[tuple[int, int]]:
    """Prompt and output of the requests before the one that is timed.

    The first long prefill of a process is slower than those that follow: under the measured clock even ways without a
    first request get one. Then one of a single token takes its unmapping upon itself, but for its own page-group's; it
    also gives eager allocation the time to prepare a row.
    """
    short = (1, params.output_tokens)
    if way.first:
        return [(math.ceil(way.first * params.prompt_tokens), params.output_tokens)]
    if clock == "measured":
        return [(params.prompt_tokens, params.output_tokens), short]
    return [short] if way.eager else []


def system_in(way: Way, system: System) -> System:
    """The system with that way's allocator, serving one request at a time."""
    allocator: Any = StaticConfig()
    if way.page_group is not None:
        allocator = replace(
            system.allocator, page_group=way.page_group, max_rows=2, overlap=False, watermark=0, reclaim_threshold=0,
            deferred_reclamation=way.deferred, eager_allocation=way.eager,
        )  # fmt: skip
    published = way.name if way.name in PUBLISHED_WAYS else None
    alone = replace(system.scheduler, max_seqs=1)
    return replace(system, name=way.name, variant=way.name, published=published, allocator=allocator, scheduler=alone)


def _summary(run: Run, samples: pd.DataFrame) -> Iterator[SummaryRow]:
    tokens = run.params.prompt_tokens
    size = f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)
    plain = samples[samples.way == PLAIN.name].set_index("round").prefill_s
    for way in WAYS:
        own = samples[samples.way == way.name].set_index("round")
        mine = {"paper": "kvarena", "figure": NAME, **_columns(run, way)}
        yield row(_estimate(own.prefill_s), paper="vattention", figure="fig13", unit="s",
                  quantity=f"prefill_time_{size}_prompt", **_columns(run, way))  # fmt: skip
        yield row(_estimate(own.prefill_s / plain), quantity="prefill_time_over_no_vmm_calls", unit="ratio", **mine)
        yield row(_estimate(1e3 * own.mapping_s), quantity="mapping_time", unit="ms", **mine)
        rest = own.prefill_s - own.mapping_s
        yield row(_estimate(100 * own.mapping_s / rest), quantity=HEADLINE, unit="%", **mine)
        yield row(float(own.slabs.iloc[0]), quantity="page_groups_per_tensor", unit="count",
                  **{**mine, "evidence": "exact"})  # fmt: skip


def _estimate(samples: pd.Series) -> Estimate | float:
    return median_interval(samples) if len(samples) > 1 else float(samples.iloc[0])


def _columns(run: Run, way: Way) -> dict[str, Any]:
    evidence = "measured" if run.clock == "measured" else "predicted"
    shared = {"experiment": NAME, "panel": run.shown_model, "evidence": evidence}
    return shared | columns(run, system_in(way, the_system(run)))


def draw(summary: pd.DataFrame) -> Figure:
    """What mapping adds to a prefill, one panel for each model; diamonds are what the published times say."""
    ours = summary[summary.quantity == HEADLINE]
    theirs = published_values("vattention", figure="fig13")
    panels = list(ours.groupby("panel", sort=False))
    figure, axes = plots.canvas(1, len(panels), width=5)
    for axis, (panel, rows) in zip(axes, panels, strict=True):
        _bars(axis, rows, theirs[theirs.panel == panel].set_index("system").value)
        axis.set_title(f"{panel}\n{rows.clock.iloc[0]}, {rows.device.iloc[0]}", fontsize=9)
    figure.tight_layout()
    return figure


def _bars(axis: Axes, rows: pd.DataFrame, theirs: pd.Series) -> None:
    names = [system.split("/")[0] for system in rows.system]
    places = range(len(names))
    spread = [(rows.value - rows.ci_low).fillna(0), (rows.ci_high - rows.value).fillna(0)]
    axis.barh(places, rows.value, 0.7, xerr=spread, color=plots.COLOURS["vattention"], label="this run")
    if len(theirs):
        published = [100 * (theirs.get(name, np.nan) / theirs[PLAIN.name] - 1) for name in names]
        axis.plot(published, places, "kD", ms=5, label="published")
    axis.set_yticks(places, names, fontsize=8)
    axis.invert_yaxis()
    axis.set(xlabel="mapping, % of the rest of the prefill", xlim=(0, None))
    axis.legend(fontsize=7, frameon=False, loc="upper right")
