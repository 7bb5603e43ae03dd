"""One replay under either clock: the same frames; where pools, traces and names come from."""

import pytest

from kvarena.errors import UserError
from kvarena.experiments.compose import compose_run
from kvarena.experiments.replay import Replayer, context_of, pool_bytes_of, trace_named, workload_of
from kvarena.harness.run import Run

WASTE = "experiment=memory_waste"
SMALL = ("clock=measured", "device=cpu", "model=tiny-opt", "arrival.duration_s=0.05", "arrival.rate=200",
         "trace.max_tokens=64", "params.pool_bytes=262144")  # fmt: skip


def system(run: Run, name: str):
    return next(s for s in run.systems if s.name == name)


def test_pools_come_from_params_then_the_engine_then_the_device():
    run = compose_run(WASTE)
    assert pool_bytes_of(run, run.systems[0]) == 984 * 16 * 819_200  # as the engine ran
    lean = compose_run(WASTE, "engine=lean")
    assert pool_bytes_of(lean, lean.systems[0]) // (16 * 819_200) == 984  # as the device has left
    given = compose_run(WASTE, "params.pool_bytes=123456789")
    assert pool_bytes_of(given, given.systems[0]) == 123_456_789
    sharded = compose_run(WASTE, "model=opt-66b", "model.tp=4")
    assert pool_bytes_of(sharded, sharded.systems[0]) == 605 * 16 * 2_359_296 // 4  # one device's


def test_a_measured_pool_is_the_users_to_say():
    run = compose_run(WASTE, *SMALL)
    run.params.pool_bytes = None
    with pytest.raises(UserError, match=r"params\.pool_bytes"):
        pool_bytes_of(run, run.systems[0])


def test_both_clocks_give_the_same_frames():
    modelled = compose_run(WASTE, "arrival.duration_s=10", "systems=[paged,vattention-64kb]")
    measured = compose_run(WASTE, *SMALL, "systems=[paged,vattention-64kb]")
    for name in ("paged", "vattention-64kb"):
        frames = [Replayer(run).serve(system(run, name), workload_of(run)) for run in (modelled, measured)]
        assert list(frames[0].requests.columns) == list(frames[1].requests.columns)
        assert list(frames[0].steps.columns) == list(frames[1].steps.columns)
        for served in frames:
            assert set(served.requests.state) == {"finished"}
            assert (served.requests.finish_ps > served.requests.arrival_ps).all()
            assert set(served.steps.system) == {name}


def test_a_trace_is_the_runs_own_or_one_of_conf():
    run = compose_run(WASTE, "trace.path=a.csv")
    assert trace_named(run, "sharegpt").path == "a.csv"
    assert trace_named(run, "sharegpt", "b.csv").path == "b.csv"
    assert trace_named(run, "alpaca", "b.csv").path == "b.csv"
    assert trace_named(run, "alpaca").path is None


def test_seeds_and_rates_change_the_workload_alone():
    run = compose_run(WASTE, "arrival.duration_s=20")
    one, other = workload_of(run, seed=1), workload_of(run, seed=2, rate=8.0)
    assert list(one.arrival_ps) == list(workload_of(run, seed=1).arrival_ps)
    assert len(other) > 1.5 * len(one)
    assert run.arrival.rate == 4.0


def test_the_longest_sequence_is_the_models_or_the_traces():
    assert context_of(compose_run(WASTE)) == 2048
    assert context_of(compose_run(WASTE, *SMALL)) == 64
