"""Decode throughput by batch size (vAttention Fig 8 and Table 7): what does the memory layout cost a decode step?

Every system of a cell holds the same K/V of the same sequences. They are checked to yield the same logits, as far as
kernels round alike, then decode in turn, round by round, so that whatever disturbs the machine disturbs them all.
"""

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvarena.allocators.usage import LEAVES
from kvarena.allocators.vmm.fragments import scattered_pages_held
from kvarena.errors import UserError
from kvarena.experiments import decode_modelled, plots
from kvarena.experiments.decode_cell import measure_cell
from kvarena.experiments.replay import columns
from kvarena.harness.calibration import StreamingRead
from kvarena.harness.model import panel_name
from kvarena.harness.model.build import build_model
from kvarena.harness.progress import Progress
from kvarena.harness.record import Frames, Outcome, Recorder
from kvarena.harness.run import Run
from kvarena.harness.statistics import Estimate, median_interval
from kvarena.harness.summary import SummaryRow, frame, published_values, row
from kvarena.harness.trace import Trace, TraceConfig, load_trace
from kvarena.harness.trace.account import account_of
from kvarena.harness.trace.told import tell

NAME = "decode_throughput"
HEADLINE = "decode_throughput_vs_batch"


@dataclass
class Params:
    """`params.*` of conf/experiment/decode_throughput.yaml; null there means: by the profile of the device."""

    batch_sizes: list[int] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)  # "trace": the trace's; a number: that many tokens, as in Fig 8
    max_tokens: int = 0  # longest sequence: the row of a static allocator
    pool_bytes: int | None = None  # of every allocator; null: batch x max_tokens, what static reservation needs
    warmup_steps: int = 0
    check_steps: int = 0  # steps whose logits are compared between the systems before anything is timed
    rounds: int = 0  # interleaved repetitions, the samples of every interval; at least 6 give 95 %
    steps_per_round: int = 0
    models: dict[str, int] = field(default_factory=dict)  # modelled clock: name -> tensor-parallel degree

    @property
    def steps(self) -> int:
        """Tokens that every sequence decodes."""
        return self.warmup_steps + self.check_steps + self.rounds * self.steps_per_round


def run(run: Run, recorder: Recorder) -> Outcome:
    """Measure every batch size and summarise."""
    params: Params = run.params
    _check(params)
    if run.clock == "modelled":
        return decode_modelled.run_modelled(run, recorder)
    device = torch.device(run.device.kind)
    prompts, trace_notes = _prompts(run)
    model = build_model(run.model, device)
    with scattered_pages_held():
        read = StreamingRead(device)
    frames: list[Frames] = []
    with Progress(NAME, len(prompts) * len(params.batch_sizes) * params.rounds) as progress:
        for kind, lengths in prompts.items():
            for batch in params.batch_sizes:
                progress.stage(f"{kind}, batch {batch}")
                key = f"{kind}-{batch}".replace(" ", "-")
                if recorder.has_cell(key):
                    progress.advance(params.rounds)
                cell = recorder.cell(key, partial(measure_cell, run, model, read, lengths[:batch], progress))
                frames.append({name: table.assign(prompts=kind) for name, table in cell.items()})
    steps, requests, cells = (
        pd.concat([f[name] for f in frames], ignore_index=True) for name in ("steps", "requests", "cells")
    )
    summary = frame(itertools.chain(_summary(run, steps, cells), _over_paged(run, steps)))
    notes = {"trace": trace_notes, "calibration": cells.to_dict("records")}
    return Outcome(summary, requests, steps, HEADLINE, draw(summary), notes)


def _check(params: Params) -> None:
    if not params.batch_sizes or min(params.batch_sizes) < 1:
        raise UserError(f"params.batch_sizes={params.batch_sizes}: at least one size is needed, each 1 or more")
    for key in ("batch_sizes", "prompts"):
        values = getattr(params, key)
        if not values or len(set(values)) < len(values):
            raise UserError(f"params.{key}={values}: name at least one, and none twice")
    for key in ("rounds", "steps_per_round", "check_steps"):
        if getattr(params, key) < 1:
            raise UserError(f"params.{key}={getattr(params, key)}: at least 1 is needed")


def _prompts(run: Run) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """Prompt lengths of the largest batch, by what they are called, and where they come from."""
    params: Params = run.params
    largest, room = max(params.batch_sizes), params.max_tokens - params.steps - 2
    if params.max_tokens > run.model.max_tokens:
        raise UserError(f"params.max_tokens={params.max_tokens}: {run.model.name} ends at {run.model.max_tokens}")
    lengths: dict[str, list[int]] = {}
    notes: dict[str, Any] = {}
    for kind in params.prompts:
        if kind == "trace":
            trace = load_trace(run.trace, params.max_tokens)
            lengths[trace.name], notes = _trace_prompts(run.trace, trace, largest, room)
        elif kind.isdecimal() and 0 < int(kind) <= room:
            lengths[f"{kind} tokens"] = [int(kind)] * largest
        else:
            raise UserError(
                f'params.prompts={kind}: neither "trace" nor a number of tokens from 1 to {room}, which is what '
                f"params.max_tokens={params.max_tokens} leaves beside the {params.steps} tokens that are decoded"
            )
    return lengths, notes


def _trace_prompts(config: TraceConfig, trace: Trace, largest: int, room: int) -> tuple[list[int], dict[str, Any]]:
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


def _summary(run: Run, steps: pd.DataFrame, cells: pd.DataFrame) -> Iterator[SummaryRow]:
    """One row per system, batch size and quantity; the intervals are over rounds."""
    grid = itertools.product(steps.prompts.unique(), run.params.batch_sizes, run.systems)
    for kind, batch, system in grid:
        here, cell = (
            table[(table.prompts == kind) & (table.batch == batch) & (table.system == system.name)]
            for table in (steps, cells)
        )
        for paper, figure, quantity, value, unit, evidence in _quantities(run, here, cell.iloc[0]):
            yield row(
                    value, experiment=NAME, paper=paper, figure=figure, panel=_panel(run, kind), quantity=quantity,
                    x=batch, unit=unit, evidence=evidence, **columns(run, system),
                )  # fmt: skip


def _over_paged(run: Run, steps: pd.DataFrame) -> Iterator[SummaryRow]:
    """Throughput over that of blocks under the same kernel, round by round: noise that both share cancels."""
    paged = {system.kernel.name: system.name for system in run.systems if system.allocator.name == "paged"}
    for (kind, batch), cell in steps.groupby(["prompts", "batch"], sort=False):
        seconds = cell.groupby(["system", "round"])["step_s"].sum()  # of as many steps and tokens everywhere
        for system in run.systems:
            other = paged.get(system.kernel.name, system.name)
            if system.name != other:
                ratio = median_interval(seconds[other] / seconds[system.name])
                yield row(
                    ratio, experiment=NAME, paper="kvarena", figure=NAME, panel=_panel(run, str(kind)), x=batch,
                    quantity="throughput_over_paged_vs_batch", unit="ratio", evidence="measured",
                    **columns(run, system),
                )  # fmt: skip


def _panel(run: Run, kind: str) -> str:
    """The published panel where the run imitates Fig 8 (16K tokens each), else model and prompts."""
    if run.imitates and kind == "16384 tokens":
        return panel_name(run.model)
    return f"{run.model.name} {kind}"


Quantity = tuple[str, str, str, Estimate | float, str, str]


def _quantities(run: Run, steps: pd.DataFrame, cell: pd.Series) -> Iterator[Quantity]:
    """(paper, figure, quantity, value, unit, evidence) of one system at one batch size."""
    rounds = steps.groupby("round")
    total = rounds["step_s"].sum()
    attention = rounds["attention_s"].sum()
    token_bytes = run.model.kv_layout().token_bytes
    limit = max(cell.read_gb_per_s_before, cell.read_gb_per_s_after)
    bandwidth = rounds["kv_tokens"].sum() * token_bytes / attention / 1e9

    def ours(quantity: str, value: Any, unit: str, evidence: str = "measured") -> Quantity:
        return "kvarena", NAME, quantity, value, unit, evidence

    yield "vattention", "fig8", "decode_throughput_vs_batch", median_interval(rounds["batch"].sum() / total), "tok/s", "measured"  # fmt: skip  # noqa: E501
    if steps["attention_s"].notna().all():  # a step replayed as a graph has no parts
        yield "vattention", "table7", "decode_attention_time_vs_batch", median_interval(1e3 * rounds["attention_s"].mean()), "ms", "measured"  # fmt: skip  # noqa: E501
        yield ours("append_time_vs_batch", median_interval(1e3 * rounds["append_s"].mean()), "ms")
        yield ours("attention_share_of_step", median_interval(100 * attention / total), "%")
        yield ours("kv_read_bandwidth", median_interval(bandwidth), "GB/s")
        yield ours("kv_read_share_of_streaming_read", median_interval(100 * bandwidth / limit), "%")
    yield ours("step_time_vs_batch", median_interval(1e3 * rounds["step_s"].mean()), "ms")
    yield ours("step_time_p99_vs_batch", float(1e3 * steps["step_s"].quantile(0.99)), "ms")
    yield ours("streaming_read_before", float(cell.read_gb_per_s_before), "GB/s")
    yield ours("streaming_read_after", float(cell.read_gb_per_s_after), "GB/s")
    overhead = rounds["schedule_s"].sum() + rounds["view_s"].sum()
    yield ours("scheduler_policy_view_share_of_step", median_interval(100 * overhead / total), "%")
    yield ours("actions_share_of_step", median_interval(100 * rounds["actions_s"].sum() / total), "%")
    for count in ("growths", "actions", "ahead"):
        yield ours(f"{count}_in_window", float(steps[count].sum()), "count", "exact")
    for key in ("driver_critical", "driver_background"):
        yield ours(f"{key}_calls", float(cell[key]), "count", "exact")
        yield ours(f"{key}_time", 1e3 * float(cell[f"{key}_s"]), "ms")
    yield ours("driver_waited", 1e3 * float(cell.driver_waited_s), "ms")
    for key in ("mapped_bytes", "pooled_bytes"):
        yield ours(key, float(cell[key]), "bytes", "exact")
    for leaf in LEAVES:
        share = 100 * steps[leaf].sum() / (len(steps) * cell.pool_bytes)
        yield ours(f"share_of_kv_memory:{leaf}", float(share), "%", "exact")


def draw(summary: pd.DataFrame) -> Figure:
    """Ours, the bandwidth behind it and the memory under it; below, the paper's Fig 8."""
    if set(summary.clock) == {"modelled"}:
        return decode_modelled.draw(summary)
    theirs = published_values("vattention", figure="fig8")
    ours = summary[summary.quantity == HEADLINE]
    device = f"{ours.device.iloc[0]}, {ours.clock.iloc[0]}"
    titles = f"this run: {{panel}}\n{device}", "published: vAttention Fig 8\n{panel}, 16K tokens each, A100"
    figure, above, below = plots.over_published(ours, theirs, _throughput, titles)
    _bandwidth(above, summary, device)
    _memory(below, summary, device)
    return plots.tidy(figure)


def _throughput(axis: Axes, rows: pd.DataFrame, title: str) -> None:
    plots.lines(axis, rows)
    axis.set(ylabel="decode tokens/s", title=title, ylim=(0, None))
    plots.batch_axis(axis, sorted(rows.x.unique()))
    axis.legend(fontsize=7, frameon=False)


def _bandwidth(axis: Axes, summary: pd.DataFrame, device: str) -> None:
    """K/V read in attention, over what the machine can read at all."""
    rows = summary[summary.quantity == "kv_read_share_of_streaming_read"]
    if rows.empty:
        return
    rows = rows[rows.panel == rows.panel.iloc[-1]]
    plots.lines(axis, rows)
    axis.axhline(100, color="black", lw=0.8, ls="--")
    axis.set(ylabel="K/V read, % of a streaming read", title=f"attention bandwidth: {rows.panel.iloc[0]}\n{device}")
    axis.set_ylim(0, 110)
    plots.batch_axis(axis, sorted(rows.x.unique()))


def _memory(axis: Axes, summary: pd.DataFrame, device: str) -> None:
    """Where the pool's bytes are, at the largest batch."""
    rows = summary[summary.quantity.str.startswith("share_of_kv_memory:")]
    rows = rows[(rows.panel == rows.panel.iloc[-1]) & (rows.x == rows.x.max())]
    shares = rows.assign(leaf=rows.quantity.str.split(":").str[1]).pivot(index="system", columns="leaf", values="value")
    shown = [leaf for leaf in LEAVES if shares[leaf].max() > 0]
    plots.stacked_bars(axis, shares.loc[list(dict.fromkeys(rows.system))], shown)
    axis.set(ylabel="% of the KV pool", title=f"memory at batch {rows.x.iloc[0]:g}: {rows.panel.iloc[0]}\n{device}")
    axis.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
