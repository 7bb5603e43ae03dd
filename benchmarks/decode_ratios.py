"""What the allocators cost a decode step: three ratios of one cell of `decode_throughput`, interleaved.

    .venv/bin/python -P benchmarks/decode_ratios.py [--batch 32] [--context 1024] [--rounds 12]

1. attention time of static over vattention, same kernel body; goal 0.98 where attention is >= 30 % of the step, with
   at least 20 growth events in the window
2. scheduler + policy + view building as a share of the step; goal at most 5 % at batch 32
3. mapping calls on the critical path of vattention in steady decode, overlap on; goal 0
"""

import argparse

import pandas as pd
import torch

from kvarena.experiments.command.compose import compose_run
from kvarena.experiments.vattention.decode_cell import measure_cell
from kvarena.harness.measured.calibration import StreamingRead
from kvarena.harness.model.build import build_model
from kvarena.harness.record.progress import Progress
from kvarena.harness.record.statistics import Estimate, median_interval


def main() -> None:
    """Measure one cell and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=12)
    given = parser.parse_args()
    run = compose_run(
        "experiment=decode_throughput",
        "device=cpu",
        "systems=[static-numba,paged-numba,vattention-numba]",
        f"params.batch_sizes=[{given.batch}]",
        f"params.prompts=['{given.context}']",
        f"params.rounds={given.rounds}",
    )
    device = torch.device("cpu")
    with Progress("decode_ratios", given.rounds) as progress:
        prompts = [given.context] * given.batch
        steps = measure_cell(run, build_model(run.model, device), StreamingRead(device), prompts, progress)["steps"]
    report(steps)


def report(steps: pd.DataFrame) -> None:
    """Print the ratios with their intervals."""
    rounds = steps.groupby(["system", "round"])[["attention_s", "step_s", "schedule_s", "view_s"]].sum()
    attention = rounds["attention_s"].unstack("system")
    share = 100 * (rounds["attention_s"] / rounds["step_s"]).groupby("system").median()
    overhead = 100 * (rounds["schedule_s"] + rounds["view_s"]) / rounds["step_s"]
    vattention = steps[steps.system == "vattention-numba"]
    print(f"{'attention, share of the step':44}", "  ".join(f"{name} {value:.0f} %" for name, value in share.items()))
    line(
        "attention time, static / vattention",
        median_interval(attention["static-numba"] / attention["vattention-numba"]),
    )
    line("attention time, static / paged", median_interval(attention["static-numba"] / attention["paged-numba"]))
    for name, values in overhead.groupby("system"):
        line(f"scheduler + policy + view, % of step, {name}", median_interval(values))
    print(f"{'growth events of vattention in the window':44} {vattention.growths.sum()}")
    print(f"{'mappings of it on the critical path':44} {vattention.actions.sum()}")


def line(what: str, estimate: Estimate) -> None:
    """One line: median, interval, samples."""
    print(f"{what:44} {estimate:.3f}  n={estimate.n}")


if __name__ == "__main__":
    main()
