"""What fills a GPU's memory while it serves (PagedAttention Figs 1 and 3, Table 1): arithmetic and policies.

Under the measured clock there is only the right half of Fig 1, read off a small replay on this machine.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvarena.allocators.kv_layout import attention_layout
from kvarena.allocators.policy import Admission, Sequence
from kvarena.allocators.reservation.contiguous import ContiguousConfig, ContiguousPolicy
from kvarena.errors import UserError
from kvarena.experiments.kit.cells import Cell, run_cells
from kvarena.experiments.kit.panels import Panel, curves, drawn, stacked
from kvarena.experiments.kit.replay import Replayer, workload_of
from kvarena.experiments.pagedattention import memory_by_batch
from kvarena.experiments.pagedattention.memory_by_batch import GB, Batches
from kvarena.harness.config import load, typed
from kvarena.harness.engine.serving import BLOCK_TOKENS, pool_bytes_of
from kvarena.harness.model import ModelConfig, load_preset
from kvarena.harness.modelled.device_model import DeviceConfig
from kvarena.harness.modelled.kv_pool import GIB, kv_pool_bytes
from kvarena.harness.record.record import Frames, Measured, Recorder
from kvarena.harness.record.summary import SummaryRow, beside_published, published_values, row
from kvarena.harness.requests.workload import Workload
from kvarena.harness.run.published import OURS, as_ours, named, without_trace
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System

NAME = "memory_layout"
HEADLINE = "memory_per_running_request"
READS = {
    "modelled": ("model", "trace", "engine", "device", "systems"),
    "measured": ("model", "trace", "arrival", "decoding", "engine", "device", "systems", "threads"),
}
LAYOUT = "13B on A100-40GB"  # as Fig 1 calls its left half
PRINTED = ("parameter_size", "kv_cache_memory", "max_kv_slots", "never_used_slots")  # in Table 1, and in Fig 3
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

    @property
    def batches(self) -> Batches:
        """x of Fig 1."""
        return Batches(self.reserving_batches, self.on_demand_batches, self.throughput_batches)


def unread(run: Run[Params]) -> dict[str, str]:
    """Keys that this run does not read, and what to write instead."""
    if run.clock == "measured":
        arithmetic = ("servers", "reservations", "nominal_gb", "reserving_batches", "on_demand_batches",
                      "throughput_batches")  # fmt: skip
        return {f"params.{key}": "it is arithmetic of clock=modelled" for key in arithmetic}
    unused = {key: "nothing is replayed under clock=modelled; clock=measured replays" for key in (
        "params.rounds", "scheduler", "trace.mix", "allocator.watermark", "allocator.swap_bytes", "device.map_us",
        "device.unmap_us",
    )}  # fmt: skip
    return unused | {"params.pool_bytes": "the modelled pool is the engine's, or what device.memory_gib leaves"}


def measure(run: Run[Params], recorder: Recorder) -> Measured:
    """What all panels need; under the measured clock the replays of this machine."""
    workload = workload_of(run)
    notes = {"workload": workload.provenance, "fitted": FITTED}
    if run.clock == "modelled":
        _check(run.params)
        return Measured(_arithmetic(run) | memory_by_batch.frames(run, workload, run.params.batches), notes)
    replayer = Replayer(run)
    cells = [
        Cell(f"{number}-{system.name}", partial(_cell, replayer, system, workload), {"round": number})
        for number in range(run.params.rounds)
        for system in run.systems
    ]
    return Measured(run_cells(run.experiment, recorder, cells), notes)


def _cell(replayer: Replayer, system: System, workload: Workload) -> Frames:
    served = replayer.serve(system, workload)
    return {"requests": served.requests, "steps": served.steps}


def _check(params: Params) -> None:
    """Raises UserError for two servers or requests of one name, one batch twice, and for no batch."""
    batches = {
        "reserving_batches": params.reserving_batches,
        "on_demand_batches": params.on_demand_batches,
        "throughput_batches": params.throughput_batches,
    }
    _refuse_twice("servers", [(each.model, each.tp, each.device) for each in params.servers])
    _refuse_twice("reservations", [_shown(each) for each in params.reservations])
    for key, values in batches.items():
        _refuse_twice(key, values)
        if not (values and min(values) >= 0):
            raise UserError(f"params.{key}={list(values)}: at least one batch size, each 0 or more")
    if min(params.throughput_batches) < 1:
        raise UserError(f"params.throughput_batches={params.throughput_batches}: a batch that runs has at least 1")
    if params.nominal_gb <= 0:
        raise UserError(f"params.nominal_gb={params.nominal_gb}: must be above 0")


def _refuse_twice(key: str, values: Collection[object]) -> None:
    if len(set(values)) < len(values):
        raise UserError(f"params.{key}: one stands there twice")


def _arithmetic(run: Run[Params]) -> Frames:
    """Frames of Table 1, Fig 3 and the left of Fig 1."""
    tables = {
        "servers": [_server(server) for server in run.params.servers],
        "reservations": [{"request": _shown(each), "slots": _never_used(each)} for each in run.params.reservations],
        "device_memory": [_device_memory(run)],
    }
    return {name: pd.DataFrame(table) for name, table in tables.items() if table}


def _server(server: Server) -> dict[str, object]:
    """Weights, and what they leave for K/V, by the formula of vLLM's memory analyser of 2023."""
    model, device = _served(server)
    token_bytes = model.kv_layout().token_bytes
    blocks = kv_pool_bytes(device, model) // (BLOCK_TOKENS * token_bytes)
    return {"parameter_bytes": model.weight_bytes, "blocks": blocks, "token_bytes": token_bytes}


def _served(server: Server) -> tuple[ModelConfig, DeviceConfig]:
    device: DeviceConfig = typed(DeviceConfig, load("device", server.device), "device")
    return load_preset(server.model, tp=server.tp), device


def _shown(request: Reservation) -> str:
    return f"{request.name} (max {request.max_tokens})"


def _never_used(request: Reservation) -> int:
    """Slots that a request is given, and will never use, where its longest possible length is reserved."""
    slot = attention_layout(num_layers=1, num_kv_heads=1, head_size=1)
    pool = request.max_tokens * slot.token_bytes
    policy = ContiguousPolicy(ContiguousConfig(estimate="max"), slot, pool, max_tokens=request.max_tokens)
    seq = Sequence(0, request.prompt_tokens, request.output_tokens)
    if policy.admit(Admission([seq], seq.prompt_tokens)) is None:
        raise UserError(f"params.reservations: {request.name} is longer than its {request.max_tokens} tokens")
    return policy.usage().over_estimate // slot.token_bytes


def _device_memory(run: Run[Params]) -> dict[str, object]:
    """Bytes of one device: its share of the weights, the pool, and all there is."""
    weights, pool = run.model.shard().weight_bytes, pool_bytes_of(run, run.systems[0])
    return {"parameters": weights, "kv_cache": pool, "there_is": round(run.device.need("memory_gib") * GIB)}


def summarize(run: Run[Params], frames: Frames) -> Iterator[SummaryRow]:
    """Rows of all panels; under the measured clock those of this machine."""
    if run.clock == "measured":
        yield from memory_by_batch.measured(run, frames["steps"])
        return
    yield from _fig3(run, frames)
    yield from _table1(run, frames)
    yield from _fig1_layout(run, frames["device_memory"].iloc[0])
    yield from memory_by_batch.modelled(run, frames)


def _fig3(run: Run[Params], frames: Frames) -> Iterator[SummaryRow]:
    lengths = {_shown(each): [each.prompt_tokens, each.output_tokens] for each in run.params.reservations}
    for name in lengths:
        table = frames["reservations"].set_index("request").slots
        names = named(without_trace(run), None, "fig3", key=name, label=name, counted=True, lengths=lengths)
        yield row(table[name], quantity="never_used_slots", unit="tokens", **names)


def _table1(run: Run[Params], frames: Frames) -> Iterator[SummaryRow]:
    """The memory of devices was fitted to some columns: their device's file says to which."""
    for server, sizes in zip(run.params.servers, frames.get("servers", pd.DataFrame()).to_dict("records"), strict=True):
        model, device = _served(server)
        here = without_trace(replace(run, model=model, device=device))
        blocks, token_bytes = sizes["blocks"], sizes["token_bytes"]
        slots = blocks * BLOCK_TOKENS
        names = named(here, None, "table1", key="server", label="server")
        counted = named(here, None, "table1", key="server", label="server", counted=True)
        yield row(sizes["parameter_bytes"] / GB, quantity="parameter_size", unit="GB", **counted)
        # the paper prints 12 GB and means GiB
        yield row(slots * token_bytes / GIB, quantity="kv_cache_memory", unit="GiB", **names)
        yield row(slots, quantity="max_kv_slots", unit="tokens", **names)
        yield row(blocks, quantity="kv_blocks_of_16", unit="blocks", **as_ours(names))
        yield row(token_bytes, quantity="kv_bytes_per_token", unit="bytes", **named(here, label="server", counted=True))


def _fig1_layout(run: Run[Params], sizes: pd.Series) -> Iterator[SummaryRow]:
    """Shares of one device: as the paper divides (1e9 bytes by the nominal size), and of the memory there is."""
    here, there_is = without_trace(run), sizes["there_is"]
    parts = {"parameters": sizes["parameters"], "kv_cache": sizes["kv_cache"]}
    for part, part_bytes in parts.items():
        share = 100 * part_bytes / GB / run.params.nominal_gb
        names = named(here, None, "fig1", key=LAYOUT, label="device", counted=part == "parameters", half="layout",
                      nominal_gb=run.params.nominal_gb)  # fmt: skip
        yield row(share, quantity=f"share_of_gpu_memory:{part}", unit="%", **names)
    for part, part_bytes in (parts | {"others": there_is - sum(parts.values())}).items():
        names = named(here, label="device", counted=part == "parameters")
        yield row(100 * part_bytes / there_is, quantity=f"share_of_memory_there_is:{part}", unit="%", **names)


BY_BATCH = (
    Panel(curves, "memory_vs_batch", "memory, GB", "batch size"),
    Panel(curves, "throughput_vs_batch", "tokens/s", "batch size"),
)
PARTS = {"parameters": "#0072B2", "kv_cache": "#009E73", "others": "#DDDDDD"}
_BARS = partial(stacked, colours=PARTS)


def draw(summary: pd.DataFrame) -> Figure:
    """Fig 1: the device's memory, then memory and throughput by batch size; Table 1 and Fig 3 as a table.

    The device's memory is divided as Fig 1, left, does it where it is that device's, else of all there is. Of a
    measured run there are the middle two.
    """
    earned = summary[summary.paper != OURS].quantity
    shares = Panel(_BARS, "share_of_memory_there_is:.*", "% of the device's memory")
    if earned.str.startswith("share_of_gpu_memory:").any():
        shares = Panel(_BARS, "share_of_gpu_memory:.*", "% of 40 GB")
    printed = Panel(_printed, "|".join(PRINTED), "", by_setup=False)
    return drawn(summary, [shares, *BY_BATCH, printed])


def _printed(axis: Axes, rows: pd.DataFrame) -> None:
    """What Table 1 and Fig 3 print, beside the published number where it stands for it."""
    axis.set_axis_off()
    rows = beside_published(rows, published_values("pagedattention"))
    names = rows.setup.where(rows.label == "server", rows.label) + ": " + rows.quantity.str.replace("_", " ")
    cells = [
        [n, f"{v:,.5g} {u}", "-" if pd.isna(p) else f"{p:,g}"]
        for n, v, u, p in zip(names, rows.value, rows.unit, rows.published, strict=True)
    ]
    table = axis.table(
        cells, colLabels=["", "ours", "published"], colWidths=[0.75, 0.25, 0.2], loc="center", edges="open"
    )
    table.auto_set_font_size(False)
    table.set_fontsize(7)
    title = "PagedAttention Table 1 and Fig 3" if (rows.paper != OURS).any() else "servers and reservations"
    axis.set_title(f"{title}\n{rows.clock.iloc[0]}: arithmetic", fontsize=8)
