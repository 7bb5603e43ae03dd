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
from kvarena.experiments.chrome_trace import chrome_trace
from kvarena.experiments.film import Film, film
from kvarena.experiments.replay import columns, panel_of, workload_of
from kvarena.experiments.stepped_view import stepped_view
from kvarena.experiments.timeline import draw_timeline, timeline
from kvarena.harness.record import Outcome, Recorder
from kvarena.harness.run import Run
from kvarena.harness.summary import SummaryRow, frame, row
from kvarena.harness.systems import System

NAME = "memory_timeline"
HEADLINE = "mean_share_of_kv_memory"
_HELD = "bytes_held_by_request"  # "<this>_<id>:<leaf>"
PS = 10**12
DRAWN = 120  # moments of the replay that the figure has


@dataclass
class Params:
    """`params.*` of conf/experiment/memory_timeline.yaml."""

    pool_bytes: int | None = None  # small, so that requests have to wait; null: the pool the engine ran with
    samples: int = 40  # moments of the replay that summary.csv has; the pages have every step


def run(run: Run, recorder: Recorder) -> Outcome:
    """Replay, step by step, and draw. A second's work: there are no cells to continue with.

    Raises UserError for another clock than the modelled one, and for too few samples.
    """
    if run.clock != "modelled":
        raise UserError(f"clock={run.clock}: {NAME} stops a replay at every step, which takes clock=modelled")
    if run.params.samples < 2:
        raise UserError(f"params.samples={run.params.samples}: at least 2")
    workload = workload_of(run)
    films = {system.name: film(run, system, workload) for system in run.systems}
    panel = panel_of(run, run.trace.name)
    table = pd.concat([timeline(one) for one in films.values()], ignore_index=True)
    summary = frame(r for system in run.systems for r in _summary(run, system, panel, films[system.name]))
    about = {"panel": panel, "clock": run.clock, "device": run.device_name, "workload": workload.provenance}
    files = {
        "trace.json": json.dumps(chrome_trace(films.values(), about), separators=(",", ":"), default=str) + "\n",
        "steps.html": stepped_view(films.values(), f"{panel}, {run.clock} on {run.device_name}"),
    }
    requests = pd.concat([one.request_table for one in films.values()], ignore_index=True)
    steps = pd.concat([one.steps.assign(system=one.system) for one in films.values()], ignore_index=True)
    figure = draw_timeline(_samples(table, DRAWN), _title(summary))
    return Outcome(summary, requests, steps, HEADLINE, figure, {"workload": workload.provenance}, files)


def _summary(run: Run, system: System, panel: str, film: Film) -> Iterator[SummaryRow]:
    common = {"experiment": NAME, "panel": panel, **columns(run, system)}
    ours = {"paper": "kvarena", "figure": NAME, **common}
    for leaf in LEAVES:
        share = 100 * film.steps[leaf] / film.pool_bytes
        mean = float((share * film.steps.duration_ps).sum() / film.steps.duration_ps.sum())
        yield row(mean, quantity=f"{HEADLINE}:{leaf}", unit="%", evidence="predicted", **ours)
    end_s = float((film.steps.start_ps + film.steps.duration_ps).max() / PS)
    yield row(end_s, quantity="makespan", unit="s", evidence="predicted", **ours)
    preempted = int(film.steps.preempted.sum() + film.steps.swapped_out.sum())
    yield row(preempted, quantity="preemptions", unit="count", evidence="predicted", **ours)
    if system.allocator.name == "paged":
        yield row(most_unwritten(film), paper="pagedattention", figure="s4.3", unit="blocks", evidence="exact",
                  quantity="most_unwritten_blocks_of_a_sequence", **common)  # fmt: skip
    if system.allocator.name == "vattention":
        yield row(most_mapped(film), paper="vattention", figure="s6.1.1", unit="page-groups", evidence="exact",
                  quantity="most_groups_mapped_per_tensor_in_decode", **common)  # fmt: skip
    for _, sample in _samples(timeline(film), run.params.samples).iterrows():
        quantity = f"{_HELD}_{sample['request']}:{sample['leaf']}"
        yield row(sample["bytes"], quantity=quantity, x=sample["time_s"], unit="bytes", evidence="predicted", **ours)


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
        slabs = {unit: seq_id for seq_id in step.decodes for unit in step.holdings[seq_id].units}
        mapped = [a.slab for a in (*step.actions, *step.ahead) if isinstance(a, Map)]
        most = max(most, *Counter(slabs[slab] for slab in mapped if slab in slabs).values(), 0)
    return most


def _samples(table: pd.DataFrame, count: int) -> pd.DataFrame:
    """What is held at `count` moments, by the last step that began before each, and when a request's memory is gone."""
    parts = []
    for _, rows in table.groupby("system", sort=False):
        times = np.unique(rows["time_s"].to_numpy(float))
        moments = np.linspace(times[0], times[-1], count)
        kept = times[np.searchsorted(times, moments, side="right") - 1]
        parts.append(rows[rows["time_s"].isin(kept) | (rows["bytes"] == 0)])
    return pd.concat(parts, ignore_index=True)


def draw(summary: pd.DataFrame) -> Figure:
    """The timeline, from the moments that the summary keeps."""
    rows = summary[summary["quantity"].str.startswith(f"{_HELD}_")]
    kinds = rows["quantity"].str.removeprefix(f"{_HELD}_").str.split(":", expand=True)
    table = pd.DataFrame(
        {
            "system": rows["system"],
            "request": kinds[0].astype(int),
            "time_s": rows["x"],
            "leaf": kinds[1],
            "bytes": rows["value"],
        }
    )
    return draw_timeline(table[table["leaf"].isin(OWNED)], _title(summary))


def _title(summary: pd.DataFrame) -> str:
    first = summary.iloc[0]
    return f"{first['panel']}: memory of each request, {first['clock']}, {first['device']}"
