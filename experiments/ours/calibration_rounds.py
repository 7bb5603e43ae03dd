"""The rounds of a calibration: every known load once, the machine's limits, and the trace served by each system.

A round takes them in turn, so that whatever disturbs the machine disturbs all of them.
"""

from dataclasses import dataclass, field

import pandas as pd
import torch

from kvarena.experiments.kit.replay import Replayer
from kvarena.experiments.ours.timed_steps import KnownStep, Load, decode_load, prefill_load
from kvarena.harness.measured.calibration import StreamingRead
from kvarena.harness.measured.timed_call import seconds
from kvarena.harness.model.build import build_model
from kvarena.harness.model.contract import Model
from kvarena.harness.record.metrics import summarize
from kvarena.harness.record.progress import Progress
from kvarena.harness.record.record import Frames
from kvarena.harness.requests.workload import Workload
from kvarena.harness.run.run import Run
from kvarena.harness.run.systems import System


@dataclass
class Params:
    """`params.*` of conf/experiment/calibrate.yaml; null there means: by the profile."""

    name: str = "this-machine"  # of the fitted device and engine
    batch_sizes: list[int] = field(default_factory=list)  # decode loads: every batch size ...
    contexts: list[int] = field(default_factory=list)  # ... at every context
    prompts: list[int] = field(default_factory=list)  # prefill loads: tokens
    pool_bytes: int | None = None  # of the replays
    rounds: int = 0  # every load and every replay once in each; at least 6 give 95 %
    steps_per_round: int = 0  # of each load


GEMM_SIZE = 1024  # of the square matrices whose product is the machine's best


def measured_rounds(run: Run[Params], workload: Workload) -> Frames:
    """All rounds: frames `known_steps` (one row per step), `limits` and `replays` (one row per round)."""
    params = run.params
    model, replayer = build_model(run.model, run.device.kind), Replayer(run)
    named = _named_loads(run, run.systems[0], model)
    rows: dict[str, list[dict[str, object]]] = {"known_steps": [], "limits": [], "replays": []}
    read = StreamingRead(model.device)
    try:
        _steps(named, -1, 2)  # compile, and touch
        with Progress(run.experiment, params.rounds) as progress:
            for number in range(params.rounds):
                progress.stage(f"round {number + 1}")
                rows["limits"].append({"read_gb_per_s": read.gb_per_s(), "tflop_per_s": gemm_tflop_per_s(model)})
                rows["known_steps"] += _steps(named, number, params.steps_per_round)
                rows["replays"] += [
                    {"system": s.name, "round": number, **replay_metrics(replayer, s, workload)} for s in run.systems
                ]
                progress.advance()
    finally:
        for _, load in named:
            load.close()
    return {name: pd.DataFrame(table) for name, table in rows.items()}


def _named_loads(run: Run[Params], system: System, model: Model) -> list[tuple[dict[str, object], Load]]:
    """Every load and its labels: `axis`, `group` and `x` place it in a plot, `fitted` says which half it is of."""
    params = run.params
    steps = 2 + params.rounds * params.steps_per_round
    named: list[tuple[dict[str, object], Load]] = []
    for i, batch in enumerate(params.batch_sizes):
        for j, context in enumerate(params.contexts):
            labels = {"axis": "decode", "group": batch, "x": context, "fitted": (i + j) % 2 == 0}
            named.append((labels, decode_load(run, system, model, batch, context, steps)))
    for i, tokens in enumerate(params.prompts):
        labels = {"axis": "prefill", "group": 1, "x": tokens, "fitted": i % 2 == 0}
        named.append((labels, prefill_load(run, system, model, tokens)))
    return named


def _steps(named: list[tuple[dict[str, object], Load]], number: int, count: int) -> list[dict[str, object]]:
    rows = []
    for labels, load in named:
        for _ in range(count):
            step: KnownStep = load.sample()
            rows.append({**labels, "round": number, **step._asdict(), "projections_s": step.projections_s})
    return rows


def gemm_tflop_per_s(model: Model, repetitions: int = 5) -> float:
    """Best of a few products of square matrices, in 1e12 operations per second."""
    dtype = getattr(torch, model.config.dtype)
    left, right = torch.rand(2, GEMM_SIZE, GEMM_SIZE, device=model.device).to(dtype)
    best_s = min(seconds(lambda: torch.mm(left, right), model.device) for _ in range(repetitions))
    return 2 * GEMM_SIZE**3 / best_s / 1e12


def replay_metrics(replayer: Replayer, system: System, workload: Workload) -> dict[str, float]:
    """What a replay of the workload comes to (`harness/record/metrics.py`)."""
    served = replayer.serve(system, workload)
    return summarize(served.requests, served.steps, served.resumed_gaps_ps)
