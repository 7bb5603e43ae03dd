"""Engines that tell kernels apart price every experiment: a system's kernel and layout choose the constants."""

from dataclasses import replace

import pandas as pd

from kvarena.experiments.command.compose import compose_run
from kvarena.experiments.kit.replay import workload_of
from kvarena.experiments.ours.step_frames import film
from kvarena.experiments.pagedattention.memory_by_batch import frames, modelled
from kvarena.experiments.pagedattention.preemption_cost import RECOMPUTE, modelled_costs
from kvarena.harness.run.run import Run

SARATHI = ("engine=sarathi2024", "model=yi-6b", "systems=[paged-fa2]", "device=a100-80gb", "clock=modelled")


def halved(run: Run, key: str) -> Run:
    """The run with another prefill efficiency of one kernel."""
    cost = run.engine.attention[key]
    attention = run.engine.attention | {key: replace(cost, flop_efficiency=cost.flop_efficiency / 2)}
    return replace(run, engine=replace(run.engine, attention=attention))


def test_a_recomputation_takes_the_systems_own_kernel() -> None:
    run = compose_run("experiment=preemption", *SARATHI)
    as_filed, own, other = (
        modelled_costs(one, run.systems[0], 8000)[RECOMPUTE]
        for one in (run, halved(run, "fa2/paged"), halved(run, "fa2/contiguous"))
    )
    assert own > as_filed == other


def test_a_film_is_priced() -> None:
    run = compose_run("experiment=memory_timeline", *SARATHI, "trace.num_requests=2", "trace.max_tokens=128")
    steps = film(run, run.systems[0], workload_of(run)).steps
    assert (steps.duration_ps > 0).all()


def test_throughput_by_batch_is_priced() -> None:
    run = compose_run("experiment=memory_layout", *SARATHI, "trace.num_requests=2", "trace.max_tokens=128")
    rows = pd.DataFrame(modelled(run, frames(run, workload_of(run), run.params.batches)))
    assert (rows[rows.quantity == "throughput_vs_batch"].value > 0).all()
    assert len(rows[rows.quantity == "throughput_vs_batch"])
