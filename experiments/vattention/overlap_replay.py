"""Fig 12 under the modelled clock: one replay for each way of mapping, its decode-only iterations one by one."""

from dataclasses import replace

import pandas as pd

from kvarena.errors import UserError
from kvarena.experiments.kit.replay import Replayer, workload_of
from kvarena.experiments.vattention.mapped_system import on_gpus, the_system, with_driver_calls
from kvarena.experiments.vattention.overlap_cell import Params, Way, geometries, system_in
from kvarena.harness.modelled.step_model import PS_PER_S
from kvarena.harness.record.record import Frames
from kvarena.harness.run.run import Run

_PS_PER_MS = PS_PER_S // 1000


def replayed(run: Run[Params]) -> Frames:
    """As `overlap_cell.measure`. A driver call counts once for each tensor, on each of the model's GPUs alike."""
    steps, calls = [], []
    run = on_gpus(run, run.model.tp, run.params.max_tokens)
    run = replace(run, model=replace(run.model, max_tokens=run.params.max_tokens))
    workload = workload_of(run)
    for way in Way:
        priced = with_driver_calls(run, {Way.PREMAPPED: 0, Way.IN_TURN: run.model.tp}.get(way, 1))
        system = system_in(way, the_system(run))
        system = replace(system, scheduler=replace(system.scheduler, max_seqs=run.params.max_batch))
        decoding = decode_only(Replayer(priced, jump=False).serve(system, workload).steps, run.params.iterations)
        if way is Way.PREMAPPED:
            decoding = decoding.assign(actions=0)
        steps.append(decoding.assign(way=way.value))
        [geometry] = geometries(system, run.model.shard().kv_layout())
        tensors = geometry.num_tensors  # with tensor slicing one K and one V over all layers
        totals = {"critical": tensors * decoding.actions.sum(), "background": tensors * decoding.ahead.sum()}
        calls.append({"way": way.value, **totals})
    return {"iterations": pd.concat(steps, ignore_index=True), "driver_calls": pd.DataFrame(calls)}


def decode_only(steps: pd.DataFrame, count: int) -> pd.DataFrame:
    """The first `count` iterations without a prompt token; a row of the log is one iteration.

    Raises UserError where there is none.
    """
    rows = steps[(steps.prefills == 0) & (steps.decodes > 0)].iloc[:count]
    if rows.empty:
        raise UserError("no iteration only decodes: every output is of one token, or prompts are fed all the time")
    assert (rows.steps == 1).all(), "the replay was walked step by step"
    return pd.DataFrame(
        {
            "latency_ms": rows.duration_ps.to_numpy() / _PS_PER_MS,
            "batch": rows.decodes.to_numpy(),
            "stall_ms": rows.stall_ps.to_numpy() / _PS_PER_MS,
            "actions": rows.actions.to_numpy(),
            "ahead": rows.ahead.to_numpy(),
            "iteration": range(len(rows)),
        }
    )
