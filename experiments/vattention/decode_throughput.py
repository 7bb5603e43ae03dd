"""Decode throughput by batch size (vAttention Fig 8 and Table 7): what does the memory layout cost a decode step?

Every system of a cell holds the same K/V of the same sequences. They are checked to yield the same logits, as far as
kernels round alike, then decode in turn, round by round, so that whatever disturbs the machine disturbs them all.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from kvarena.allocators.usage import LEAVES
from kvarena.errors import UserError
from kvarena.experiments.kit.cells import Cell, run_cells
from kvarena.experiments.kit.panels import Panel, curves, drawn, stacked, title
from kvarena.experiments.kit.published_models import model_columns, unread_models
from kvarena.experiments.kit.quantities import Quantity, rows
from kvarena.experiments.vattention import decode_modelled
from kvarena.experiments.vattention.decode_modelled import HEADLINE, TRACE, Params, named_at
from kvarena.experiments.vattention.driver_calls import check_counts
from kvarena.harness.accounts.told import tell
from kvarena.harness.accounts.trace_account import account_of
from kvarena.harness.record.record import Frames, Measured, Recorder
from kvarena.harness.record.statistics import median_interval
from kvarena.harness.record.summary import SummaryRow, row
from kvarena.harness.run.run import Run
from kvarena.harness.trace import Trace, TraceConfig, load_trace

READS = {
    "modelled": ("model", "engine", "device", "systems"),
    "measured": ("model", "trace", "engine", "device", "systems", "threads"),
}


def unread(run: Run[Params]) -> dict[str, str]:
    """Keys that this run does not read, and what to write instead."""
    keys = unread_models(run, run.params.models)
    keys["allocator.watermark"] = "the batch is resident from the start, and nobody waits for what would be left"
    if run.clock == "modelled":
        keys["device.unmap_us"] = "no sequence of a batch ends, so that nothing is unmapped"
        keys["scheduler.max_seqs"] = "params.batch_sizes=[...] are the batches, resident from the start"
        keys["params.max_tokens"] = "a row is as long as its sequence gets: params.prompts and the steps"
        return keys
    if TRACE not in run.params.prompts:
        keys["trace"] = f"params.prompts={run.params.prompts} are no prompts of a trace; params.prompts=[trace] are"
    else:
        keys["trace.mix"] = "prompts are taken of it, and every sequence decodes greedily"
    return keys


def measure(run: Run[Params], recorder: Recorder) -> Measured:
    """Measure every batch size; under the modelled clock of every model."""
    _check(run.params)
    if run.clock == "modelled":
        return decode_modelled.measure(run, recorder)
    import torch

    from kvarena.allocators.vmm.fragments import scattered_pages_held
    from kvarena.experiments.vattention.decode_cell import measure_cell
    from kvarena.harness.measured.calibration import StreamingRead
    from kvarena.harness.model.build import build_model

    device = torch.device(run.device.kind)
    prompts, trace_notes = _prompts(run)
    model = build_model(run.model, device)
    with scattered_pages_held(run.device.kind):
        read = StreamingRead(device)
    cells = [
        Cell(f"{'trace' if kind == TRACE else f'{kind}-tokens'}-{batch}",
             partial(measure_cell, run, model, read, lengths[:batch]), {"prompts": kind, **model_columns(run)})
        for kind, lengths in prompts.items()
        for batch in run.params.batch_sizes
    ]  # fmt: skip
    frames = run_cells(run.experiment, recorder, cells)
    return Measured(frames, {"trace": trace_notes, "calibration": frames["batches"].to_dict("records")})


def _check(params: Params) -> None:
    if not params.batch_sizes or min(params.batch_sizes) < 1:
        raise UserError(f"params.batch_sizes={params.batch_sizes}: at least one size is needed, each 1 or more")
    for key in ("batch_sizes", "prompts"):
        values = getattr(params, key)
        if not values or len(set(values)) < len(values):
            raise UserError(f"params.{key}={values}: name at least one, and none twice")
    check_counts(params, "rounds", "steps_per_round", "check_steps")


def _prompts(run: Run[Params]) -> tuple[dict[str, list[int]], dict[str, object]]:
    """Prompt lengths of the largest batch, by what `params.prompts` calls them, and where the trace's come from."""
    params: Params = run.params
    largest, room = max(params.batch_sizes), params.max_tokens - params.steps - 2
    if params.max_tokens > run.model.max_tokens:
        raise UserError(f"params.max_tokens={params.max_tokens}: {run.model.name} ends at {run.model.max_tokens}")
    lengths: dict[str, list[int]] = {}
    notes: dict[str, object] = {}
    for kind in params.prompts:
        if kind == TRACE:
            lengths[kind], notes = _trace_prompts(run.trace, load_trace(run.trace, params.max_tokens), largest, room)
        elif kind.isdecimal() and 0 < int(kind) <= room:
            lengths[kind] = [int(kind)] * largest
        else:
            raise UserError(
                f'params.prompts={kind}: neither "trace" nor a number of tokens from 1 to {room}, which is what '
                f"params.max_tokens={params.max_tokens} leaves beside the {params.steps} tokens that are decoded"
            )
    return lengths, notes


def _trace_prompts(config: TraceConfig, trace: Trace, largest: int, room: int) -> tuple[list[int], dict[str, object]]:
    """The first prompts of the trace that leave room for what is decoded; how many did not is in the notes."""
    fitting = np.flatnonzero(trace.prompt_tokens <= room)
    if len(fitting) < largest:
        raise UserError(
            f"trace {trace.name} has {len(fitting)} prompts of at most {room} tokens, a batch of {largest} needs more"
        )
    served, over = trace.take(fitting[:largest]), len(trace) - len(fitting)
    account = account_of(config, served).without(f"prompts over {room}", over)
    tell(account)
    notes = {**trace.provenance, "prompts_over_room": over, "account": asdict(account)}
    return served.prompt_tokens.tolist(), notes


def summarize(run: Run[Params], frames: Frames) -> Iterator[SummaryRow]:
    """Fig 8 and Table 7, and what else is known of a step, by system and batch size; intervals are over rounds."""
    if run.clock == "modelled":
        yield from decode_modelled.point_rows(run, frames["points"])
        return
    yield from _rows(run, frames["steps"], frames["batches"])
    yield from _over_paged(run, frames["steps"])


def _rows(run: Run[Params], steps: pd.DataFrame, batches: pd.DataFrame) -> Iterator[SummaryRow]:
    grid = itertools.product(steps.prompts.unique(), run.params.batch_sizes, run.systems)
    for kind, batch, system in grid:
        here, account = (
            table[(table.prompts == kind) & (table.batch == batch) & (table.system == system.name)]
            for table in (steps, batches)
        )
        names = partial(named_at, run, system, kind, x=batch)
        yield from rows(_quantities(here), _by_round(run, here, account), names)


def _over_paged(run: Run[Params], steps: pd.DataFrame) -> Iterator[SummaryRow]:
    """Throughput over that of blocks under the same kernel, round by round: noise that both share cancels."""
    paged = {system.kernel.name: system.name for system in run.systems if system.allocator.name == "paged"}
    for (kind, batch), cell in steps.groupby(["prompts", "batch"], sort=False):
        seconds = cell.groupby(["system", "round"])["step_s"].sum()  # of as many steps and tokens everywhere
        for system in run.systems:
            other = paged.get(system.kernel.name, system.name)
            if system.name != other:
                ratio = median_interval(seconds[other] / seconds[system.name])
                names = named_at(run, system, str(kind), x=int(str(batch)))
                yield row(ratio, quantity="throughput_over_paged_vs_batch", unit="ratio", **names)


def _by_round(run: Run[Params], steps: pd.DataFrame, account: pd.DataFrame) -> pd.DataFrame:
    """One system at one batch size: sums and `mean_`s over the steps of each round, and what is known of all rounds."""
    rounds, known = steps.groupby("round"), account.iloc[0]
    table = rounds.sum(numeric_only=True).join(rounds.mean(numeric_only=True).add_prefix("mean_"))
    table = table.assign(**known.drop([name for name in known.index if name in steps]), steps=rounds.size())
    read = max(known.read_gb_per_s_before, known.read_gb_per_s_after)  # what the machine reads at all
    bandwidth = table.kv_tokens * run.model.kv_layout().token_bytes / table.attention_s / 1e9
    return table.assign(kv_gb_per_s=bandwidth, read_gb_per_s=read, p99_step_s=steps.step_s.quantile(0.99))


def _first(column: str, factor: float = 1) -> Callable[[pd.DataFrame], float]:
    """What is alike in all rounds."""
    return lambda rounds: factor * float(rounds[column].iloc[0])


def _total(column: str) -> Callable[[pd.DataFrame], float]:
    """A count over all rounds."""
    return lambda rounds: float(rounds[column].sum())


def _share(leaf: str) -> Callable[[pd.DataFrame], float]:
    """Percent of the pool's bytes, over all steps."""
    return lambda rounds: float(100 * rounds[leaf].sum() / (rounds.steps.sum() * rounds.pool_bytes.iloc[0]))


def _quantities(steps: pd.DataFrame) -> Iterator[Quantity]:
    """What is known of one system at one batch size; a step replayed as a graph has no parts."""
    yield Quantity(HEADLINE, "tok/s", lambda rounds: rounds.batch / rounds.step_s, "fig8")
    yield from PARTS if steps.attention_s.notna().all() else ()
    yield from WHOLE


PARTS = (
    Quantity("decode_attention_time_vs_batch", "ms", lambda rounds: 1e3 * rounds.mean_attention_s, "table7"),
    Quantity("append_time_vs_batch", "ms", lambda rounds: 1e3 * rounds.mean_append_s),
    Quantity("attention_share_of_step", "%", lambda rounds: 100 * rounds.attention_s / rounds.step_s),
    Quantity("kv_read_bandwidth", "GB/s", "kv_gb_per_s"),
    Quantity("kv_read_share_of_streaming_read", "%", lambda rounds: 100 * rounds.kv_gb_per_s / rounds.read_gb_per_s),
)
WHOLE = (
    Quantity("step_time_vs_batch", "ms", lambda rounds: 1e3 * rounds.mean_step_s),
    Quantity("step_time_p99_vs_batch", "ms", _first("p99_step_s", 1e3)),
    Quantity("streaming_read_before", "GB/s", _first("read_gb_per_s_before")),
    Quantity("streaming_read_after", "GB/s", _first("read_gb_per_s_after")),
    Quantity("scheduler_policy_view_share_of_step", "%",
             lambda rounds: 100 * (rounds.schedule_s + rounds.view_s) / rounds.step_s),
    Quantity("actions_share_of_step", "%", lambda rounds: 100 * rounds.actions_s / rounds.step_s),
    *(Quantity(f"{each}_in_window", "count", _total(each), counted=True) for each in ("growths", "actions", "ahead")),
    Quantity("driver_critical_calls", "count", _first("driver_critical"), counted=True),
    Quantity("driver_critical_time", "ms", _first("driver_critical_s", 1e3)),
    Quantity("driver_background_calls", "count", _first("driver_background"), counted=True),
    Quantity("driver_background_time", "ms", _first("driver_background_s", 1e3)),
    Quantity("driver_waited", "ms", _first("driver_waited_s", 1e3)),
    Quantity("mapped_bytes", "bytes", _first("mapped_bytes"), counted=True),
    Quantity("pooled_bytes", "bytes", _first("pooled_bytes"), counted=True),
    *(Quantity(f"share_of_kv_memory:{leaf}", "%", _share(leaf), counted=True) for leaf in LEAVES),
)  # fmt: skip


def _bandwidth(axis: Axes, rows: pd.DataFrame) -> None:
    """K/V read in attention, over what the machine can read at all."""
    curves(axis, rows)
    axis.axhline(100, color="black", lw=0.8, ls="--")
    axis.set_ylim(0, 110)


def _memory(axis: Axes, rows: pd.DataFrame) -> None:
    """Where the pool's bytes are, at the largest batch."""
    rows = rows[rows.x == rows.x.max()]
    stacked(axis, rows)
    title(axis, rows, f"memory at batch {rows.x.iloc[0]:g}")


PANELS = (
    Panel(curves, HEADLINE, "decode tokens/s", "batch size", "decode throughput", doubling=True),
    Panel(_bandwidth, "kv_read_share_of_streaming_read", "K/V read, % of a streaming read", "batch size",
          "attention bandwidth", doubling=True),
    Panel(_memory, "share_of_kv_memory:.*", "% of the K/V pool"),
)  # fmt: skip
draw = partial(drawn, panels=PANELS)
