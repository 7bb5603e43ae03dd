"""GB/s of K/V that decode attention reads, by batch and context, beside a read-only reduction.

The measurement is that of experiment=attention_kernel: the same bytes serve as rows, as blocks in order and as shuffled
blocks, small batches are read many times over, each time elsewhere, so that no cache holds what is read, and every
kernel is first held to float64. One that refuses, or is wrong, costs its own line.
"""

import itertools
import traceback
from collections.abc import Iterator
from typing import cast

import pandas as pd
import torch

from kvarena.experiments.command.compose import compose_run
from kvarena.experiments.gpu_validation.record import Values, fault_behind
from kvarena.experiments.gpu_validation.step import Context
from kvarena.experiments.gpu_validation.steps.kernels import ARRANGEMENTS, kernel_names
from kvarena.experiments.kit.attention_time import USUAL_BLOCK
from kvarena.experiments.pagedattention.attention_kernel import Line, Params, line_of, measure_lines
from kvarena.harness.measured.calibration import StreamingRead
from kvarena.harness.run.run import Run
from kvarena.kernels.arrangement import Arrangement
from kvarena.kernels.registry import fits, kernel_spec, missing

GOAL = (32, 16384)  # batch and context that the goals are stated for
GRID = {
    "cuda": [GOAL, *itertools.product((1, 4, 16, 64), (1024, 4096, 16384, 65536))],
    "cpu": [(2, 256), (1, 512)],
}
_SHORT = {
    "cuda": ["model.dtype=bfloat16", f"params.working_set_bytes={1 << 30}"],
    "cpu": ["model.dtype=float32", f"params.working_set_bytes={16 << 20}"],
}
SLOW = frozenset({"sdpa", "gather_sdpa", "vllm_paged"})  # one call per sequence, or a copy of everything, each time


def cases(device: str) -> list[str]:
    """The goal's point first."""
    return [f"batch {batch}, context {context}" for batch, context in GRID[device]]


def uses(case: str) -> list[str]:
    """The experiment's configuration, and every kernel."""
    return ["conf/experiment/attention_kernel.yaml", "conf/model/llama-3-8b.yaml", "kernels"]


def run(case: str, context: Context) -> Values:
    """GB/s of every kernel and arrangement, their share of the reduction's, and the goal's ratio."""
    batch, tokens = point_of(case)
    alike = ["experiment=attention_kernel", "model=llama-3-8b", "params.rounds=7"]  # its heads
    run = cast("Run[Params]", compose_run(*alike, f"device={context.device}", *_SHORT[context.device]))
    names = {line: f"{line.kernel} {arrangement}" for arrangement, line in _lines(run, batch * tokens)}
    read = StreamingRead(torch.device(context.device))
    refusals: Values = {}

    def refused(line: Line, error: Exception) -> None:
        if fault_behind(error):
            raise error  # nothing that comes after it on this GPU would be true
        traceback.print_exc()
        refusals[f"{names[line]}, not measured"] = str(error).split("\n")[0]

    samples = measure_lines(run, read, list(names), batch, tokens, refused)["samples"]
    kinds = zip(samples.kernel, samples.block_size.fillna(0), samples.scattered, strict=True)
    rates = samples.bytes / samples.call_s / 1e9
    taken = pd.DataFrame({"rate": rates, "share": rates / samples.streaming_gb_per_s})
    medians = taken.groupby([names[line_of(*kind)] for kind in kinds], sort=False).median()
    rate, share = ({str(name): float(value) for name, value in medians[of].items()} for of in ("rate", "share"))
    ours = {"triton rows / fa3 rows": rate["triton rows"] / rate["fa3 rows"]} if "fa3 rows" in rate else {}
    return {
        **{name: round(ratio, 3) for name, ratio in ours.items()},
        **{f"{name} / read": round(value, 3) for name, value in share.items()},
        "read, GB/s": round(float(samples.streaming_gb_per_s.median()), 1),
        **{f"{name}, GB/s": round(value, 1) for name, value in rate.items()},
        **refusals,
    }


def point_of(case: str) -> tuple[int, int]:
    """Batch and context."""
    batch, context = (int(part.split()[1]) for part in case.split(", "))
    return batch, context


def _lines(run: Run[Params], tokens: int) -> Iterator[tuple[str, Line]]:
    """Every kernel that is here and not too slow, on what it reads; `tokens` of K/V are read by one call."""
    on_gpu, model = run.device.kind == "cuda", run.model
    num_bytes = tokens * 2 * model.num_kv_heads * model.head_size * (2 if on_gpu else 4)
    for name, (arrangement, scattered) in itertools.product(kernel_names(run.device.kind), ARRANGEMENTS.items()):
        spec = kernel_spec(name)
        block = USUAL_BLOCK if spec.block_sizes is None or USUAL_BLOCK in spec.block_sizes else min(spec.block_sizes)
        where = Arrangement(None) if scattered is None else Arrangement(block, scattered)
        unread = missing(spec) or fits(spec, where.layout, run.device.kind, model.dtype, model.head_size, block)
        on_the_host = on_gpu and not spec.in_graph and num_bytes < run.params.working_set_bytes  # it would be timed
        if not (unread or on_the_host or name in SLOW):
            yield arrangement, Line(name, where)
