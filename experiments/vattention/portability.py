"""Which kernels run over which allocator's memory, unchanged (vAttention Table 1, Fig 16), and how long paging lagged.

Every kernel that is installed here runs over every allocator whose layout it reads: prompts are appended to real memory
and prefilled, a token is added to each and decoded, and both outputs are held to attention in float64. A kernel without
block tables is one that PagedAttention cannot use until somebody rewrites it; the *lag* is how long that took
(`results/published/kernel_releases.csv`, with sources).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.dates import date2num
from matplotlib.figure import Figure

from kvarena.allocators.memory.store import Store
from kvarena.allocators.policy import Admission, Policy
from kvarena.allocators.registry import allocator_names, memory_layout
from kvarena.errors import UserError
from kvarena.experiments.kit import plots
from kvarena.experiments.kit.attention_time import TOLERANCE
from kvarena.experiments.kit.cells import Cell, run_cells
from kvarena.experiments.kit.kernel_pairs import allocator_named, kernel_over, unread_of_model
from kvarena.experiments.kit.legend import swept
from kvarena.experiments.vattention.driver_calls import check_counts
from kvarena.harness.engine.serving import Serving
from kvarena.harness.paths import PUBLISHED
from kvarena.harness.record.record import Frames, Measured, Recorder
from kvarena.harness.record.summary import SummaryRow, row
from kvarena.harness.requests.request import Request
from kvarena.harness.run.published import named
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System
from kvarena.kernels.append import append
from kvarena.kernels.kernel import AttentionKernel
from kvarena.kernels.reference import reference_attention
from kvarena.kernels.registry import fits, get_kernel, kernel_names, kernel_spec, missing

HEADLINE = "share_of_contiguous_kernels_that_run"
FIGURE = "table1"
READS = {"measured": ("model", "device", "threads")}
ON_DEMAND = ("vattention", "paged")  # whose memory is held against rows reserved up front
RELEASES = PUBLISHED / "kernel_releases.csv"
USUAL_BLOCK = 16
OUTCOMES = ("reads another layout", "not here", "fails", "passes")  # in the figure's order of colours


@dataclass
class Params:
    """`params.*` of conf/experiment/portability.yaml; null there means: by the profile."""

    prompts: list[int] = field(default_factory=list)  # tokens of each sequence
    max_tokens: int = 0
    pool_bytes: int = 0
    page_group: str = ""  # of vattention


class Pair(NamedTuple):
    """One cell of the matrix."""

    allocator: str
    kernel: str


def unread(run: Run[Params]) -> dict[str, str]:
    """Keys that this run does not read, and what to write instead."""
    return unread_of_model(run, "num_layers")  # of the memory, whose last layer is read


def measure(run: Run[Params], recorder: Recorder) -> Measured:
    """Try every pair. Raises UserError where no kernel that reads rows runs here."""
    _check(run.params)
    pairs = [Pair(allocator, kernel) for allocator in allocator_names() for kernel in kernel_names()]
    measured = run_cells(run.experiment, recorder, [Cell("pairs", lambda: _matrix(run, pairs))])
    if not _passing(measured["pairs"], "static"):
        raise UserError(f"device={run.device_name}: no kernel that reads rows runs here; ./run.sh kernels says why")
    return Measured({**measured, "releases": read_releases()})


def summarize(run: Run[Params], frames: Frames) -> Iterator[SummaryRow]:
    """How every pair ended, the shares of kernels that run over memory on demand, and the months that paging took."""
    pairs, releases = frames["pairs"], frames["releases"]
    codes = ", ".join(f"{i} {name}" for i, name in enumerate(OUTCOMES))
    for each in pairs.itertuples():
        names = partial(named, run, kernel_over(allocator_named(str(each.allocator)), str(each.kernel)), detail="pairs")
        yield row(OUTCOMES.index(str(each.outcome)), quantity="outcome", unit=codes, **names())
        yield row(float(bool(each.layout_fits)), quantity="layout_fits", unit="yes or no", **names(counted=True))
    for allocator in ON_DEMAND:
        ours = partial(named, run, label=allocator)
        yield row(_share(_passing(pairs, allocator), _passing(pairs, "static")), quantity=HEADLINE, unit="%",
                  **ours(figure=FIGURE, key=allocator, detail="kernels"))  # fmt: skip
        fitting = _share(_fitting(pairs, allocator), _fitting(pairs, "static"))
        yield row(fitting, quantity="share_of_contiguous_kernels_that_fit", unit="%",
                  **ours(counted=True, detail="catalogue"))  # fmt: skip
    for library, months in zip(releases.library, releases.lag_months, strict=True):
        yield row(months, quantity="months_from_contiguous_to_paged", unit="months",
                  **named(run, label=library, detail="lag", counted=True))  # fmt: skip


def _check(params: Params) -> None:
    check_counts(params, "max_tokens", "pool_bytes")
    if not params.prompts or min(params.prompts) < 1 or max(params.prompts) >= params.max_tokens:
        raise UserError(
            f"params.prompts={params.prompts}: lengths from 1 to {params.max_tokens - 1}, which leaves room for a token"
        )


def _matrix(run: Run[Params], pairs: Sequence[Pair]) -> Frames:
    rows = []
    for pair in pairs:
        outcome, gap, why = _outcome(run, pair)
        fitting = fits(kernel_spec(pair.kernel), memory_layout(pair.allocator)) is None
        rows.append({**pair._asdict(), "layout_fits": fitting, "outcome": outcome, "gap": gap, "why": why})
    return {"pairs": pd.DataFrame(rows)}


def _outcome(run: Run[Params], pair: Pair) -> tuple[str, float, str]:
    """How a pair ends, its largest difference from float64 over the largest output, and why it was not tried."""
    spec, layout = kernel_spec(pair.kernel), memory_layout(pair.allocator)
    if reason := fits(spec, layout):
        return "reads another layout", float("nan"), reason
    model = run.model
    if reason := missing(spec) or fits(spec, layout, run.device.kind, model.dtype, model.head_size):
        return "not here", float("nan"), reason
    with _prompts_admitted(run, pair) as serving:
        try:
            gap = _largest_gap(run, get_kernel(pair.kernel), serving.policy, serving.store)
        except Exception as error:  # whatever a library raises is the answer
            return "fails", float("nan"), f"{type(error).__name__}: {error}"
    return ("passes" if gap <= TOLERANCE[model.dtype] else "fails"), gap, ""


@contextmanager
def _prompts_admitted(run: Run[Params], pair: Pair) -> Iterator[Serving]:
    """The allocator with room for the prompts. Raises UserError where the pool has none."""
    params = run.params
    with Serving(run, _system(run, pair), context=params.max_tokens) as serving:
        for i, tokens in enumerate(params.prompts):
            if serving.policy.admit(Admission([Request(i, tokens, 1)], tokens)) is None:
                raise UserError(f"params.pool_bytes={params.pool_bytes}: {pair.allocator} has no room for the prompts")
        yield serving


def _largest_gap(run: Run[Params], kernel: AttentionKernel, policy: Policy, store: Store) -> float:
    """Prefill prompts and decode one token of each over the allocator's memory; the gap of the worse."""
    prompts = run.params.prompts
    generator = torch.Generator().manual_seed(run.model.seed)
    gaps = [_gap(run, kernel, store, policy, prompts, prompts, generator)]
    for i in range(len(prompts)):
        policy.grow(i)
    gaps.append(_gap(run, kernel, store, policy, [n + 1 for n in prompts], [1] * len(prompts), generator))
    return max(gaps)


def _gap(
    run: Run[Params], kernel: AttentionKernel, store: Store, policy: Policy, lengths: Sequence[int],
    queries: Sequence[int], generator: torch.Generator,
) -> float:  # fmt: skip
    """Append as many tokens as there are queries, attend, and compare."""
    local, cache = run.model, store.layer(run.model.num_layers - 1)
    store.apply(policy.drain())
    view = store.view(range(len(lengths)), lengths, queries)

    def draw(heads: int) -> torch.Tensor:
        return torch.randn(sum(queries), heads, local.head_size, generator=generator).to(cache.k)

    append(draw(local.num_kv_heads), draw(local.num_kv_heads), cache, view)
    q = draw(local.num_heads)
    out = torch.full_like(q, float("nan"))
    (kernel.decode if view.is_decode else kernel.prefill)(q, cache, view, out)
    expected = reference_attention(q, cache, view)
    return float(((out.double().cpu() - expected).abs().max() / expected.abs().max()).nan_to_num(float("inf")))


def _system(run: Run[Params], pair: Pair) -> System:
    """The pair as configured, with a block size that the kernel reads and the page-group of this run."""
    wanted: dict[str, object] = {"page_group": run.params.page_group, "max_rows": len(run.params.prompts) + 1}
    sizes = kernel_spec(pair.kernel).block_sizes
    if sizes is not None and USUAL_BLOCK not in sizes:
        wanted["block_size"] = min(sizes)
    return kernel_over(allocator_named(pair.allocator, **wanted), pair.kernel)


def _passing(pairs: pd.DataFrame, allocator: str) -> set[str]:
    """Kernels that ran over the allocator's memory here, and were right."""
    return set(pairs[(pairs.allocator == allocator) & (pairs.outcome == "passes")].kernel)


def _fitting(pairs: pd.DataFrame, allocator: str) -> set[str]:
    """Kernels of the catalogue, installed or not, that read the allocator's layout."""
    return set(pairs[(pairs.allocator == allocator) & pairs.layout_fits].kernel)


def _share(some: set[str], every: set[str]) -> float:
    return 100 * len(every & some) / len(every)


def read_releases() -> pd.DataFrame:
    """Libraries and the months in which they first read contiguous and paged K/V; `lag_months` between them."""
    table = pd.read_csv(RELEASES)
    months = [pd.PeriodIndex(table[key], freq="M") for key in ("contiguous", "paged")]
    return table.assign(lag_months=[int(p.ordinal - c.ordinal) for c, p in zip(*months, strict=True)])


def draw(summary: pd.DataFrame) -> Figure:
    """The matrix of what ran here, and the lag of paged support by library."""
    figure, axes = plots.canvas(1, 2, width=6.5, height=4)
    _draw_matrix(axes[0], summary[summary.quantity == "outcome"])
    _draw_lag(axes[1], read_releases())
    figure.tight_layout()
    return figure


def _draw_matrix(axis: Axes, rows: pd.DataFrame) -> None:
    rows = rows.assign(memory=rows.allocator + swept(rows))
    table = rows.pivot(index="memory", columns="kernel", values="value")
    table = table.loc[list(dict.fromkeys(rows.memory)), list(dict.fromkeys(rows.kernel))]
    colours = dict(zip(OUTCOMES, ("#EEEEEE", "#CFE3F2", "#D55E00", "#009E73"), strict=True))
    for y, (_, line) in enumerate(table.iterrows()):
        for x, value in enumerate(line):
            axis.barh(y, 0.9, 0.9, x - 0.45, color=colours[OUTCOMES[int(value)]])
    for outcome, colour in colours.items():
        axis.bar(0, 0, color=colour, label=outcome)
    axis.set_xticks(range(table.shape[1]), list(table.columns), rotation=40, ha="right", fontsize=8)
    axis.set_yticks(range(len(table)), list(table.index), fontsize=8)
    axis.invert_yaxis()
    axis.grid(visible=False)
    axis.set_title(f"kernels over allocators: {rows.clock.iloc[0]}, {rows.device.iloc[0]}", fontsize=9)
    axis.legend(fontsize=7, frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.28))


def _draw_lag(axis: Axes, table: pd.DataFrame) -> None:
    months = (pd.PeriodIndex(table[key], freq="M") for key in ("contiguous", "paged"))
    starts, ends = (
        date2num([month.to_timestamp() for month in each])  # type: ignore[no-untyped-call]
        for each in months
    )
    for y, (start, end, lag) in enumerate(zip(starts, ends, table.lag_months, strict=True)):
        axis.hlines(y, start, end, color="#999999", lw=2, zorder=1)
        axis.annotate(f"{lag}", ((start + end) / 2, y - 0.12), fontsize=8, ha="center")
    axis.scatter(starts, range(len(table)), color=plots.COLOURS["vattention"], label="contiguous", zorder=2)
    axis.scatter(ends, range(len(table)), color=plots.COLOURS["paged"], marker="s", label="paged", zorder=2)
    axis.xaxis_date()
    axis.set_yticks(range(len(table)), list(table.library), fontsize=8)
    axis.tick_params(axis="x", labelsize=7)
    axis.invert_yaxis()
    axis.set_title("first release that reads contiguous and paged K/V; months between", fontsize=9)
    axis.legend(fontsize=7, frameon=False)
