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
from typing import NamedTuple

import numpy as np
import pandas as pd

from kvarena.allocators.reservation.static import StaticConfig
from kvarena.experiments.kit.cells import Cell, run_cells
from kvarena.experiments.kit.panels import Panel, bars, drawn
from kvarena.experiments.kit.published_models import by_model, model_columns, runs_by_model, unread_models
from kvarena.experiments.kit.quantities import Quantity, rows
from kvarena.experiments.kit.replay import Replayer
from kvarena.experiments.vattention.driver_calls import check_counts
from kvarena.experiments.vattention.mapped_system import on_gpus, the_system
from kvarena.harness.modelled.step_model import PS_PER_S
from kvarena.harness.record.record import Frames, Measured, Recorder
from kvarena.harness.record.summary import Names, SummaryRow
from kvarena.harness.requests.workload import Workload
from kvarena.harness.run.published import label_of, named
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import Options, System


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


@dataclass
class Params:
    """`params.*` of conf/experiment/deferred_reclamation.yaml; null there means: by the profile."""

    prompt_tokens: int = 0  # of the second request
    output_tokens: int = 4  # of the first
    pool_bytes: int | None = None
    rounds: int = 0
    gpus: dict[str, int] = field(default_factory=dict)  # modelled clock: model -> GPUs


HEADLINE = "mapping_time_over_rest"
FIGURE = "fig13"
READS = {
    "modelled": ("model", "engine", "device", "systems"),
    "measured": ("model", "engine", "device", "systems", "threads"),
}
_CHANGED = ("page_group", "max_rows", "overlap", "watermark", "reclaim_threshold", "deferred_reclamation",
            "eager_allocation")  # fmt: skip


def unread(run: Run[Params]) -> dict[str, str]:
    """Keys that this run does not read, and what to write instead."""
    keys = unread_models(run, run.params.gpus, "gpus") | {f"allocator.{each}": "the ways set it" for each in _CHANGED}
    keys["scheduler.max_seqs"] = "one request is served at a time"
    if run.clock == "modelled":
        keys["params.rounds"] = "a device model says the same every time; clock=measured repeats"
    return keys


def measure(run: Run[Params], recorder: Recorder) -> Measured:
    """Time the second prefill in every way, model by model."""
    the_system(run)
    check_counts(run.params, "prompt_tokens", "output_tokens", *(["rounds"] if run.clock == "measured" else []))
    cells = [Cell(one.model.name, partial(_measure, one), model_columns(one))
             for one in runs_by_model(run, run.params.gpus)]  # fmt: skip
    return Measured(run_cells(run.experiment, recorder, cells))


def _measure(run: Run[Params]) -> Frames:
    """A sample of every way in each round; each round begins with another way."""
    longest = run.params.prompt_tokens + run.params.output_tokens
    if run.clock == "modelled":
        run = on_gpus(run, run.model.tp, longest)
    replayer, samples = Replayer(replace(run, trace=replace(run.trace, max_tokens=longest))), []
    rounds = range(1) if run.clock == "modelled" else range(-1, run.params.rounds)
    for number in rounds:
        turn = number % len(WAYS)
        for way in [*WAYS[turn:], *WAYS[:turn]]:
            second = _second_prefill(run, replayer, way)
            if number >= 0:  # the first round compiles what compiles once
                samples.append({"round": number, "way": way.name, **second})
    return {"samples": pd.DataFrame(samples)}


def _second_prefill(run: Run[Params], replayer: Replayer, way: Way) -> dict[str, float]:
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
    allocator: Options = StaticConfig()
    if way.page_group is not None:
        allocator = replace(
            system.allocator, page_group=way.page_group, max_rows=2, overlap=False, watermark=0, reclaim_threshold=0,
            deferred_reclamation=way.deferred, eager_allocation=way.eager,
        )  # fmt: skip
    alone = replace(system.scheduler, max_seqs=1)
    return replace(system, name=way.name, variant=way.name, allocator=allocator, scheduler=alone)


def summarize(run: Run[Params], frames: Frames) -> Iterator[SummaryRow]:
    """Fig 13, and what mapping is of it, model by model."""
    for served, samples in by_model(run, frames["samples"]):
        yield from _rows(served, samples)


def _rows(run: Run[Params], samples: pd.DataFrame) -> Iterator[SummaryRow]:
    tokens = run.params.prompt_tokens
    size = f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)
    quantities = [Quantity(f"prefill_time_{size}_prompt", "s", "prefill_s", FIGURE), *OURS]
    plain = samples[samples.way == PLAIN.name].set_index("round").prefill_s
    for way in WAYS:
        own = samples[samples.way == way.name].set_index("round")
        own = own.assign(over_plain=own.prefill_s / plain, rest_s=own.prefill_s - own.mapping_s)
        yield from rows(quantities, own, partial(_names, run, way))


OURS = (
    Quantity("prefill_time_over_no_vmm_calls", "ratio", "over_plain"),
    Quantity("mapping_time", "ms", lambda own: 1e3 * own.mapping_s),
    Quantity(HEADLINE, "%", lambda own: 100 * own.mapping_s / own.rest_s),
    Quantity("page_groups_per_tensor", "count", lambda own: float(own.slabs.iloc[0]), counted=True),
)


def _names(run: Run[Params], way: Way, figure: str | None = None, counted: bool = False) -> Names:
    """What a row is called: the paper's ways are one system, with its allocator set in each."""
    listed, system = the_system(run), system_in(way, the_system(run))
    names = named(run, listed, figure, key=way.name, label=label_of(run, system), counted=counted)
    return {**names, "allocator": system.allocator.name}


PANELS = (
    Panel(bars, "prefill_time_.*_prompt", "prefill, s", what="prefill of a prompt"),
    Panel(bars, HEADLINE, "mapping, % of the rest of the prefill", what="mapping in front of a prefill"),
)
draw = partial(drawn, panels=PANELS, width=6)
