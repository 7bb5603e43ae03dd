"""The size of vAttention's page-groups: what they hold (Tables 8, 10), what small ones cost a kernel (Fig 14), and how
many requests they let run at once (Fig 15).

Fig 15 is predicted: chats of the OpenChat data set arrive at 7 requests/s, which is more than the server can take, and
the largest batch is counted. The paper does not say how long the trace was, or how its lengths were cut.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvarena.errors import UserError
from kvarena.experiments import page_group_batch, page_group_kernels, plots
from kvarena.experiments.driver_calls import check_counts, page_groups_of
from kvarena.experiments.page_group_batch import Variant
from kvarena.experiments.page_group_kernels import Point
from kvarena.experiments.page_group_tables import token_rows
from kvarena.experiments.replay import columns
from kvarena.harness.progress import Progress
from kvarena.harness.record import Outcome, Recorder
from kvarena.harness.run import Run
from kvarena.harness.statistics import median_interval
from kvarena.harness.summary import SummaryRow, frame, published_values, row
from kvarena.kernels.layout import Layout
from kvarena.kernels.registry import fits, kernel_spec, missing

NAME = "page_group_size"
HEADLINE = "max_batch_vs_page_group"
TABLED = ("yi-6b", "llama-3-8b", "yi-34b")
ASSUMED = "The trace's length and how its chats were cut are not published; 8192 tokens, and as long as the run says."


@dataclass
class Params:
    """`params.*` of conf/experiment/page_group_size.yaml; null there means: by the profile."""

    page_groups: list[str] = field(default_factory=list)  # of vattention: 64KB ...
    sliced_page_groups: list[str] = field(default_factory=list)  # and with its tensor slicing
    block_sizes: list[int] = field(default_factory=list)  # of paged, tokens
    seeds: list[int] = field(default_factory=list)  # of the trace; at least 6 give a 95 % interval
    pool_bytes: int | None = None  # measured clock
    gpus: dict[str, int] = field(default_factory=dict)  # modelled clock: model -> GPUs
    # Fig 14, measured clock
    kernels: list[str] = field(default_factory=list)
    compared: list[str] = field(default_factory=list)  # two page-groups, the smaller first
    prefill_contexts: list[int] = field(default_factory=list)  # tokens of one prompt
    decode_context: int = 0  # tokens of every sequence
    decode_batches: list[int] = field(default_factory=list)
    rounds: int = 0  # each in fresh memory

    def points(self) -> list[Point]:
        """Calls of Fig 14."""
        prefills = [Point("prefill", 1, context) for context in self.prefill_contexts]
        return prefills + [Point("decode", batch, self.decode_context) for batch in self.decode_batches]


def run(run: Run, recorder: Recorder) -> Outcome:
    """Count tokens, time kernels where they are real, and replay."""
    params: Params = run.params
    _check(run)
    kernels = params.kernels if run.clock == "measured" else []
    served = list(page_group_batch.models(run))
    variants = list(page_group_batch.variants(run))
    rows = list(token_rows(TABLED, experiment=NAME, clock=run.clock, device=run.device_name))
    points, samples = [], []
    with Progress(NAME, len(kernels) + len(served) * len(variants)) as progress:
        for kernel in kernels:
            progress.stage(kernel)
            sizes = page_groups_of(params.compared, "params.compared")
            measure = partial(page_group_kernels.measure, run.model, kernel, params.points(), sizes, params.rounds,
                              run.device.kind)  # fmt: skip
            samples.append(recorder.cell(f"kernel-{kernel}", measure)["kernels"].assign(kernel=kernel))
            progress.advance()
        for one in served:
            first: pd.DataFrame | None = None
            for variant in variants:
                progress.stage(f"{one.model.name}, {variant.label}")
                cells = [
                    recorder.cell(f"{one.model.name}-{variant.label}-{seed}".replace(" ", "-"),
                                  partial(page_group_batch.measure, one, variant, seed))["points"]
                    for seed in params.seeds
                ]  # fmt: skip
                points.append(pd.concat(cells, ignore_index=True))
                first = points[-1] if first is None else first
                rows += _batch_rows(one, variant, points[-1], first)
                progress.advance()
    if samples:
        rows += _kernel_rows(run, pd.concat(samples, ignore_index=True))
    summary, steps = frame(rows), pd.concat(samples or points, ignore_index=True)
    return Outcome(summary, pd.concat(points, ignore_index=True), steps, HEADLINE, draw(summary), {"assumed": ASSUMED})


def _check(run: Run) -> None:
    params: Params = run.params
    if not params.seeds or len(set(params.seeds)) < len(params.seeds):
        raise UserError(f"params.seeds={params.seeds}: at least one seed, and none twice")
    if run.clock == "modelled":
        return
    check_counts(params, "prefill_contexts", "decode_context", "decode_batches", "rounds")
    sizes = page_groups_of(params.compared, "params.compared")
    if len(sizes) != 2 or sizes[0] >= sizes[1]:
        raise UserError(f"params.compared={params.compared}: two page-groups are needed, the smaller first")
    for name in params.kernels:
        model = run.model
        reason = missing(kernel_spec(name)) or fits(
            kernel_spec(name), Layout.CONTIGUOUS, run.device.kind, model.dtype, model.head_size
        )
        if reason:
            raise UserError(f"params.kernels: {name}: {reason}")


def _batch_rows(run: Run, variant: Variant, points: pd.DataFrame, first: pd.DataFrame) -> Iterator[SummaryRow]:
    """The largest batch, and, seed by seed, over that of the first unit listed."""
    evidence = "measured" if run.clock == "measured" else "conditional"
    shared = {"experiment": NAME, "panel": run.shown_model, "evidence": evidence, "unit": "requests"}
    shared |= columns(run, variant.system)
    yield row(median_interval(points.max_batch), paper="vattention", figure="fig15", quantity=HEADLINE, **shared)
    ours = {**shared, "paper": "kvarena", "figure": NAME}
    yield row(median_interval(points.mean_batch), quantity="mean_batch_while_waiting_vs_page_group", **ours)
    yield row(median_interval(points.max_batch / first.max_batch), quantity=f"max_batch_over_{first.unit.iloc[0]}",
              **{**ours, "unit": "ratio"})  # fmt: skip


def _kernel_rows(run: Run, samples: pd.DataFrame) -> Iterator[SummaryRow]:
    small, large = page_groups_of(run.params.compared)
    names = "_over_".join(run.params.compared)
    for (kernel, *_), cell in samples.groupby(["kernel", *Point._fields], sort=False):
        seconds = cell.pivot(index="round", columns="page_group", values="call_s")
        first = cell.iloc[0]
        point = Point(str(first.phase), int(first.batch), int(first.context))
        axis = "context" if point.phase == "prefill" else "batch"
        suffix = "" if point.phase == "prefill" else f" {point.context}"
        yield row(
            median_interval(seconds[small] / seconds[large]), experiment=NAME, paper="vattention", figure="fig14",
            panel=run.shown_model, x=point.x, unit="ratio",
            system=f"{kernel} {point.phase}{suffix}", allocator="vattention", kernel=str(kernel),
            model=run.model.name, quantity=f"kernel_time_{names}_vs_{axis}", clock=run.clock, device=run.device_name,
            evidence="measured",
        )  # fmt: skip


def draw(summary: pd.DataFrame) -> Figure:
    """Requests at once by unit, one panel for each model; kernel times over page-groups where there are any."""
    batches = summary[summary.quantity == HEADLINE]
    kernels = summary[summary.figure == "fig14"]
    panels = list(batches.groupby("panel", sort=False))
    figure, axes = plots.canvas(1, len(panels) + (2 if len(kernels) else 0), width=4.4)
    for axis, (panel, rows) in zip(axes, panels, strict=False):
        _bars(axis, rows, f"{panel}\n{rows.clock.iloc[0]}, {rows.device.iloc[0]}")
    if len(kernels):
        theirs = published_values("vattention", figure="fig14")
        for axis, phase in zip(axes[len(panels) :], ("context", "batch"), strict=True):
            ours, published = (table[table.quantity.str.endswith(phase)] for table in (kernels, theirs))
            _kernel_lines(axis, ours, published, phase)
    figure.tight_layout()
    return figure


def _bars(axis: Axes, rows: pd.DataFrame, title: str) -> None:
    colours = [plots.COLOURS[allocator] for allocator in rows.allocator]
    spread = [(rows.value - rows.ci_low).fillna(0), (rows.ci_high - rows.value).fillna(0)]
    labels = [system.split("/")[0] for system in rows.system]
    axis.bar(range(len(rows)), rows.value, 0.7, yerr=spread, color=colours)
    axis.set_xticks(range(len(rows)), labels, rotation=30, ha="right", fontsize=8)
    axis.set(ylabel="requests at once, at most", ylim=(0, None))
    axis.set_title(title, fontsize=9)


def _kernel_lines(axis: Axes, ours: pd.DataFrame, theirs: pd.DataFrame, phase: str) -> None:
    for system, line in ours.groupby("system", sort=False):
        axis.plot(line.x, line.value, "o-", ms=4, label=f"{system}, this run")
        axis.fill_between(line.x, line.ci_low.astype(float), line.ci_high.astype(float), alpha=0.15, lw=0)
    for system, line in theirs.groupby("system", sort=False):
        axis.plot(line.x, line.value, "k_", ms=9, mew=2, label=f"{system}, published")
    plots.batch_axis(axis, sorted({*ours.x, *theirs.x}))
    axis.axhline(1, color="black", lw=0.8)
    names = ours.quantity.iloc[0].removeprefix("kernel_time_").split("_vs_")[0].replace("_", " ")
    axis.set(xlabel={"batch": "batch size", "context": "context, tokens"}[phase], ylim=(0, 1.6))
    axis.set(ylabel=f"kernel time, {names}")
    axis.set_title(f"{'prefill' if phase == 'context' else 'decode'}: {ours.panel.iloc[0]}, {ours.device.iloc[0]}",
                   fontsize=9)  # fmt: skip
    axis.legend(fontsize=7, frameon=False, loc="lower left")
