"""Pictures of one small replay: who holds which blocks or page-groups, step by step, under each allocator.

Beside the usual files the run has `trace.json`, which Perfetto opens (chrome_trace.py), and `steps.html`, a page with a
slider (stepped_view.py). Two counts of it are claims of the papers: no sequence owns a block it has not begun to write
(PagedAttention section 4.3), and a decode step maps at most one page-group in each tensor (vAttention section 6.1.1).
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kvarena.allocators.holding import OWNED
from kvarena.allocators.policy import Map
from kvarena.allocators.usage import LEAVES
from kvarena.errors import UserError
from kvarena.experiments.kit.replay import workload_of
from kvarena.experiments.ours.chrome_trace import chrome_trace
from kvarena.experiments.ours.step_frames import Film, film
from kvarena.experiments.ours.stepped_view import stepped_view
from kvarena.experiments.ours.timeline import draw_timeline, timeline
from kvarena.harness.record.record import Frames, Measured, Recorder
from kvarena.harness.record.summary import SummaryRow, row
from kvarena.harness.run.published import named, setup
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System

NAME = "memory_timeline"
HEADLINE = "mean_share_of_kv_memory"
_HELD = "bytes_held_by_request"  # "<this>_<id>:<leaf>"
PS = 10**12
READS = dict.fromkeys(("modelled", "measured"), ("model", "trace", "arrival", "engine", "device", "systems"))
COUNTED = {  # quantity -> figure that states it, unit, allocator of which it is said
    "most_unwritten_blocks_of_a_sequence": ("s4.3", "blocks", "paged"),
    "most_groups_mapped_per_tensor_in_decode": ("s6.1.1", "page-groups", "vattention"),
}
MOST_SAMPLES = 10_000  # rows of summary.csv for each of who holds what


@dataclass
class Params:
    """`params.*` of conf/experiment/memory_timeline.yaml."""

    pool_bytes: int | None = None  # small, so that requests have to wait; null: the pool the engine ran with
    samples: int = 40  # moments of the replay that summary.csv and the figure have; the pages have every step


def unread(run: Run[Params]) -> dict[str, str]:
    """Keys that this run does not read, and what to write instead."""
    unused = {"trace.mix": "every request is one sequence here, decoded greedily"}
    if run.clock != "modelled":
        unused["clock"] = f"{NAME} stops a replay at every step, which takes clock=modelled"
    return unused


def measure(run: Run[Params], recorder: Recorder) -> Measured:
    """Replay, step by step. A second's work: there are no cells to continue with.

    Raises UserError for too few samples, or too many.
    """
    if not 2 <= run.params.samples <= MOST_SAMPLES:
        raise UserError(f"params.samples={run.params.samples}: at least 2, at most {MOST_SAMPLES}")
    workload = workload_of(run)
    films = {system.name: film(run, system, workload) for system in run.systems}
    frames = {
        "held_by_request": {name: timeline(one) for name, one in films.items()},
        "requests": {name: one.request_table for name, one in films.items()},
        "steps": {name: one.steps for name, one in films.items()},
        "counts": {name: _counts(one) for name, one in films.items()},
    }
    about = {"setup": setup(run), "clock": run.clock, "device": run.device_name, "workload": workload.provenance}
    files = {
        "trace.json": json.dumps(chrome_trace(films.values(), about), separators=(",", ":"), default=str) + "\n",
        "steps.html": stepped_view(films.values(), f"{setup(run)}; {run.clock}"),
    }
    together = {
        kind: pd.concat([table.assign(system=name) for name, table in tables.items()], ignore_index=True)
        for kind, tables in frames.items()
    }
    return Measured(together, {"workload": workload.provenance}, files)


def _counts(film: Film) -> pd.DataFrame:
    """The pool, and what the papers state of every step."""
    counts = {"pool_bytes": film.pool_bytes}
    counts |= dict(zip(COUNTED, (most_unwritten(film), most_mapped(film)), strict=True))
    return pd.DataFrame([counts])


def summarize(run: Run[Params], frames: Frames) -> Iterator[SummaryRow]:
    """Shares of the pool, ends, the papers' counts, and what each request holds at some moments."""
    for system in run.systems:
        yield from _summary(run, system, frames)


def _summary(run: Run[Params], system: System, frames: Frames) -> Iterator[SummaryRow]:
    held, steps, counts = (
        f[f.system == system.name] for f in (frames[k] for k in ("held_by_request", "steps", "counts"))
    )
    ours = named(run, system)
    for leaf in LEAVES:
        share = 100 * steps[leaf] / counts.pool_bytes.iloc[0]
        mean = float((share * steps.duration_ps).sum() / steps.duration_ps.sum())
        yield row(mean, quantity=f"{HEADLINE}:{leaf}", unit="%", **ours)
    yield row(float((steps.start_ps + steps.duration_ps).max() / PS), quantity="makespan", unit="s", **ours)
    yield row(int(steps.preempted.sum() + steps.swapped_out.sum()), quantity="preemptions", unit="count", **ours)
    for quantity, (figure, unit, allocator) in COUNTED.items():
        if system.allocator.name == allocator:
            yield row(
                counts[quantity].iloc[0], quantity=quantity, unit=unit, **named(run, system, figure, counted=True)
            )
    for sample in _samples(held, run.params.samples).to_dict("records"):
        quantity = f"{_HELD}_{sample['request']}:{sample['leaf']}"
        yield row(sample["bytes"], quantity=quantity, unit="bytes", **named(run, system, x=sample["time_s"]))


def most_unwritten(film: Film) -> int:
    """Over all steps and sequences: blocks owned beyond those that hold a token."""
    holdings = [holding for step in film.frames for holding in step.holdings.values()]
    return max(len(h.units) - -(-h.length // int(film.unit_tokens)) for h in holdings)


def most_mapped(film: Film) -> int:
    """Over all steps and decoding sequences: page-groups mapped in one tensor of its row, for this step or the next.

    A row is told by what its sequence holds after the step.
    """
    most = 0
    for step in film.frames:
        owner = {unit: seq_id for seq_id in step.decodes for unit in step.holdings[seq_id].units}
        mapped = [a.page_group for a in (*step.actions, *step.ahead) if isinstance(a, Map)]
        most = max(most, *Counter(owner[unit] for unit in mapped if unit in owner).values(), 0)
    return most


def _samples(table: pd.DataFrame, count: int) -> pd.DataFrame:
    """What is held at `count` moments, by the last step that began before each, and when a request's memory is gone."""
    times = np.unique(table["time_s"].to_numpy(float))
    moments = np.linspace(times[0], times[-1], count)
    kept = times[np.searchsorted(times, moments, side="right") - 1]
    return table[table["time_s"].isin(kept) | (table["bytes"] == 0)]


def draw(summary: pd.DataFrame) -> Figure:
    """The timeline, from the moments that the summary keeps."""
    rows = summary[summary["quantity"].str.startswith(f"{_HELD}_")]
    kinds = rows["quantity"].str.removeprefix(f"{_HELD}_").str.split(":", expand=True)
    table = pd.DataFrame(
        {
            "system": rows["label"],
            "request": kinds[0].astype(int),
            "time_s": rows["x"],
            "leaf": kinds[1],
            "bytes": rows["value"],
        }
    )
    return draw_timeline(table[table["leaf"].isin(OWNED)], _title(summary))


def _title(summary: pd.DataFrame) -> str:
    first = summary.iloc[0]
    return f"memory of each request: {first['setup']}; {first['clock']}"
