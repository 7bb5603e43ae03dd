"""What fills a GPU's memory while it serves (PagedAttention Figs 1 and 3, Table 1): arithmetic and policies.

Under the measured clock there is only the right half of Fig 1, read off a small replay on this machine.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvarena.allocators.contiguous import ContiguousConfig
from kvarena.allocators.kv_layout import attention_layout
from kvarena.allocators.policy import Sequence
from kvarena.allocators.registry import make_policy
from kvarena.errors import UserError
from kvarena.experiments import memory_by_batch, plots
from kvarena.experiments.memory_by_batch import GB, layout_row
from kvarena.experiments.replay import BLOCK_TOKENS, Replayer, pool_bytes_of, workload_of
from kvarena.harness.config import load, typed
from kvarena.harness.device_model import DeviceConfig
from kvarena.harness.kv_pool import GIB, kv_pool_bytes
from kvarena.harness.model import load_preset, panel_name
from kvarena.harness.record import Frames, Outcome, Recorder
from kvarena.harness.run import Run
from kvarena.harness.summary import SummaryRow, beside_published, frame, published_values
from kvarena.harness.systems import System
from kvarena.harness.workload import Workload

NAME = "memory_layout"
HEADLINE = "memory_per_running_request"
FITTED = "Table 1 gave the devices' memory: 39.41 GiB follows from 984 and 605 blocks, 79.18 GiB from 60.1K slots."


@dataclass
class Server:
    """A column of Table 1."""

    model: str
    tp: int
    device: str


@dataclass
class Reservation:
    """A request of Fig 3, in tokens."""

    name: str
    prompt_tokens: int
    output_tokens: int
    max_tokens: int


@dataclass
class Params:
    """`params.*` of conf/experiment/memory_layout.yaml."""

    servers: list[Server] = field(default_factory=list)
    reservations: list[Reservation] = field(default_factory=list)
    nominal_gb: float = 40.0  # memory of the device as the paper divides by it, in 1e9 bytes
    reserving_batches: list[float] = field(default_factory=list)  # x of Fig 1, memory, systems that reserve
    on_demand_batches: list[float] = field(default_factory=list)  # and of those that do not
    throughput_batches: list[float] = field(default_factory=list)  # x of Fig 1, throughput
    pool_bytes: int | None = None  # measured clock only
    rounds: int = 1  # measured clock: repetitions, interleaved over systems


def run(run: Run, recorder: Recorder) -> Outcome:
    """All panels; under the measured clock those of this machine."""
    workload = workload_of(run)
    notes = {"workload": workload.provenance, "fitted": FITTED}
    if run.clock == "measured":
        replayer = Replayer(run)
        turns = [(number, system) for number in range(run.params.rounds) for system in run.systems]
        cells = [recorder.cell(f"{n}-{s.name}", partial(_cell, replayer, s, workload, n)) for n, s in turns]
        steps, requests = (pd.concat([c[name] for c in cells], ignore_index=True) for name in ("steps", "requests"))
        rows = [*memory_by_batch.measured(run, steps)]
    else:
        requests = steps = pd.DataFrame({"system": pd.Series(dtype=str)})  # nothing is replayed
        rows = [*_fig3(run), *_table1(run), *_fig1_layout(run), *memory_by_batch.modelled(run, workload)]
    summary = frame(rows)
    return Outcome(summary, requests, steps, HEADLINE, draw(summary), notes)


def _cell(replayer: Replayer, system: System, workload: Workload, number: int) -> Frames:
    served = replayer.serve(system, workload)
    return {"requests": served.requests.assign(round=number), "steps": served.steps.assign(round=number)}


def _fig3(run: Run) -> Iterator[SummaryRow]:
    """Slots that a request is given, and will never use, where its longest possible length is reserved."""
    slot = attention_layout(num_layers=1, num_kv_heads=1, head_size=1)
    for request in run.params.reservations:
        pool = request.max_tokens * slot.token_bytes
        policy = make_policy(ContiguousConfig(estimate="max"), slot, pool, request.max_tokens)
        if not policy.admit(Sequence(0, request.prompt_tokens, request.output_tokens), request.prompt_tokens):
            raise UserError(f"params.reservations: {request.name} is longer than its {request.max_tokens} tokens")
        never_used = policy.usage().over_estimate // slot.token_bytes
        place = {"figure": "fig3", "panel": "block diagram", "system": f"{request.name} (max {request.max_tokens})"}
        yield layout_row(
            run, never_used, quantity="never_used_slots", unit="tokens", allocator=policy.name, model="-", **place
        )


def _table1(run: Run) -> Iterator[SummaryRow]:
    """Weights, and what they leave for K/V, by the formula of vLLM's memory analyser of 2023."""
    for server in run.params.servers:
        model = load_preset(server.model, tp=server.tp)
        device = typed(DeviceConfig, load("device", server.device), "device")
        token_bytes = model.kv_layout().token_bytes
        blocks = kv_pool_bytes(device, model) // (BLOCK_TOKENS * token_bytes)
        slots = blocks * BLOCK_TOKENS
        place = {"figure": "table1", "panel": panel_name(model), "system": "server", "model": model.name,
                 "device": device.name}  # fmt: skip
        yield layout_row(run, model.weight_bytes / GB, quantity="parameter_size", unit="GB", **place)
        for quantity, value, unit in (
            ("kv_cache_memory", slots * token_bytes / GIB, "GiB"),  # the paper prints 12 GB and means GiB
            ("max_kv_slots", slots, "tokens"),
        ):
            yield layout_row(run, value, quantity=quantity, unit=unit, evidence="calibrated", **place)
        ours = {**place, "paper": "kvarena", "figure": NAME}
        yield layout_row(run, blocks, quantity="kv_blocks_of_16", unit="blocks", evidence="calibrated", **ours)
        yield layout_row(run, token_bytes, quantity="kv_bytes_per_token", unit="bytes", **ours)


def _fig1_layout(run: Run) -> Iterator[SummaryRow]:
    """Shares of one device: as the paper divides (1e9 bytes by the nominal size), and of the memory there is."""
    weights, pool = run.model.weight_bytes, pool_bytes_of(run, run.systems[0])
    there_is = round(run.device.need("memory_gib") * GIB)
    size = run.model.name.rpartition("-")[2].upper()
    place = {"panel": "layout", "system": f"{size} on {run.device.name.upper()}", "unit": "%"}
    for part, part_bytes in {"parameters": weights, "kv_cache": pool}.items():
        share = 100 * part_bytes / GB / run.params.nominal_gb
        yield layout_row(run, share, figure="fig1", quantity=f"share_of_gpu_memory:{part}", **place)
    ours = {**place, "paper": "kvarena", "figure": NAME}
    for part, part_bytes in {"parameters": weights, "kv_cache": pool, "others": there_is - weights - pool}.items():
        share = 100 * part_bytes / there_is
        yield layout_row(run, share, quantity=f"share_of_memory_there_is:{part}", **ours)


def draw(summary: pd.DataFrame) -> Figure:
    """Fig 1: the device's memory, then memory and throughput by batch size; Table 1 and Fig 3 as a table.

    Of a measured run there are the middle two.
    """
    theirs = published_values("pagedattention")
    by_batch = (("memory_vs_batch", "memory, GB"), ("throughput_vs_batch", "tokens/s"))
    modelled = "table1" in set(summary.figure)
    figure, axes = plots.canvas(1, 4 if modelled else 2, width=5)
    for axis, (quantity, label) in zip(axes[1:3] if modelled else axes, by_batch, strict=True):
        _by_batch(axis, summary[summary.quantity == quantity], theirs)
        axis.set_ylabel(label)
    if modelled:
        _shares(axes[0], summary, theirs)
        _printed(axes[3], summary, theirs)
    figure.tight_layout()
    return figure


def _by_batch(axis: Axes, ours: pd.DataFrame, theirs: pd.DataFrame) -> None:
    plots.lines(axis, ours)
    if set(ours.figure) == {"fig1"}:
        _dots(axis, theirs[(theirs.figure == "fig1") & (theirs.quantity == ours.quantity.iloc[0])])
    where = f"{ours.model.iloc[0]}, {ours.clock.iloc[0]}, {ours.device.iloc[0]}"
    axis.set(xlabel="batch size", title=f"PagedAttention Fig 1, right\n{where}")
    axis.legend(fontsize=7, frameon=False)


def _printed(axis: Axes, summary: pd.DataFrame, theirs: pd.DataFrame) -> None:
    """Table 1 and Fig 3, whose numbers the paper prints."""
    axis.set_axis_off()
    rows = beside_published(summary[summary.figure.isin(["table1", "fig3"])], theirs)
    names = rows.panel.where(rows.figure == "table1", rows.system) + ": " + rows.quantity.str.replace("_", " ")
    cells = [
        [n, f"{v:,.5g} {u}", f"{p:,g}"] for n, v, u, p in zip(names, rows.value, rows.unit, rows.published, strict=True)
    ]
    table = axis.table(
        cells, colLabels=["", "ours", "published"], colWidths=[0.6, 0.25, 0.2], loc="center", edges="open"
    )
    table.auto_set_font_size(False)
    table.set_fontsize(7)
    axis.set_title("PagedAttention Table 1 and Fig 3")


def _dots(axis: Axes, rows: pd.DataFrame) -> None:
    for (name, values), marker in zip(rows.groupby("system", sort=False), "xo+", strict=False):
        axis.plot(values.x, values.value, marker, color="black", ms=4, mfc="none", label=f"{name}, published")


def _shares(axis: Axes, summary: pd.DataFrame, theirs: pd.DataFrame) -> None:
    """Fig 1, left, as bars."""
    ours = summary[summary.quantity.str.startswith("share_of_gpu_memory:")]
    theirs = theirs[theirs.quantity.str.startswith("share_of_gpu_memory:")]
    for x, (rows, colour) in enumerate(((ours, "#0072B2"), (theirs, "#BBBBBB"))):
        bottom = 0.0
        for kind, value in zip(rows.quantity.str.split(":").str[1], rows["value"], strict=True):
            axis.bar(x, value, 0.6, bottom, color=colour, edgecolor="black")
            axis.text(x, bottom + value / 2, f"{kind.replace('_', ' ')}\n{value:.1f} %", ha="center", va="center")
            bottom += value
    axis.set_xticks([0, 1], ["ours", "published"])
    axis.set(ylabel="% of 40 GB", ylim=(0, 100), title=f"PagedAttention Fig 1, left\n{ours.system.iloc[0]}")
