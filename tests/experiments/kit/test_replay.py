"""One replay under either clock: the same frames; where pools, traces and names come from."""

from pathlib import Path

import pytest

from kvarena.errors import UserError
from kvarena.experiments.command.compose import compose_run
from kvarena.experiments.kit.replay import Replayer, trace_named, workload_of
from kvarena.harness.engine.serving import pool_bytes_of
from kvarena.harness.run.run import Run

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


@pytest.fixture
def own(tmp_path: Path) -> str:
    """Somebody's own file: one request over OPT's context, one a pool of 64 tokens never holds, four that it does."""
    rows = ["2000,100", "90,9", *["20,5"] * 4]
    path = tmp_path / "own.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n" + "".join(f"{i / 100},{r}\n" for i, r in enumerate(rows)))
    return str(path)


def test_somebodys_own_file_keeps_its_requests_and_arrivals(own: str, capsys: pytest.CaptureFixture[str]):
    run = compose_run(WASTE, f"trace.path={own}")
    assert (run.arrival.process, run.arrival_chosen) == ("recorded", "the file's own")
    workload = workload_of(run)
    assert workload.arrival_s.tolist() == [0.01, 0.02, 0.03, 0.04, 0.05]
    assert workload.account is not None
    assert (workload.account.filter, workload.account.dropped) == ("fits_context", {"over 2048": 1})
    workload_of(run)
    [line] = capsys.readouterr().err.splitlines()
    assert "6 read, 1 over 2048 dropped" in line
    assert workload_of(compose_run(WASTE, f"trace.path={own}", "arrival.rate=4")).account.arrivals.chosen == "asked for"
    asked = workload_of(compose_run(WASTE, f"trace.path={own}", "trace.filter=paper_artifact")).account
    assert (asked.filter, asked.dropped) == ("paper_artifact", {"by paper_artifact": 1})


def test_a_pool_that_is_small_leaves_out_what_is_counted(own: str):
    account = workload_of(compose_run(WASTE, *SMALL, f"trace.path={own}")).account
    assert account is not None
    assert account.dropped == {"over 64": 2}


def test_rates_that_are_the_axis_stay_drawn_and_each_trace_is_told(own: str, capsys: pytest.CaptureFixture[str]):
    latency = "experiment=serving_latency"
    run = compose_run(latency, f"params.paths.sharegpt={own}")
    assert run.arrival.process == compose_run(latency, f"trace.path={own}").arrival.process == "artifact"
    capsys.readouterr()
    for name, rate in (("sharegpt", 1.0), ("alpaca", 1.0), ("sharegpt", 2.0)):
        account = workload_of(run, trace_named(run, name, run.params.paths.get(name)), rate=rate, duration_s=9).account
        assert account.arrivals.chosen == "at the experiment's rates"
        assert account.filter == {"sharegpt": "fits_context", "alpaca": "none"}[name]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["trace sharegpt", "trace alpaca", "trace sharegpt"]
    assert "repeated to 16 (4 rounds)" in lines[-1], "more than at 1/s"


def test_who_is_refused_is_said_once(own: str, capsys: pytest.CaptureFixture[str]):
    pool_bytes = 5 * 16 * compose_run(WASTE, *SMALL).model.kv_layout().token_bytes  # 5 blocks, and the longest needs 7
    overrides = ("trace.max_tokens=99", f"params.pool_bytes={pool_bytes}", "systems=[paged]", "arrival=all_at_once")
    run = compose_run(WASTE, *SMALL[:3], *overrides, f"trace.path={own}")
    workload, replayer = workload_of(run), Replayer(run)
    capsys.readouterr()
    for _ in range(2):
        served = replayer.serve(run.systems[0], workload)
    assert (served.requests.refusal != "").sum() == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "paged/numba refuses 1 of 5 requests; the first: " in line


def test_seeds_and_rates_change_the_workload_alone():
    run = compose_run(WASTE, "arrival.duration_s=20")
    one, other = workload_of(run, seed=1), workload_of(run, seed=2, rate=8.0)
    assert list(one.arrival_ps) == list(workload_of(run, seed=1).arrival_ps)
    assert len(other) > 1.5 * len(one)
    assert run.arrival.rate == 4.0


def test_the_longest_sequence_is_the_models_or_the_traces():
    assert compose_run(WASTE).context == 2048
    assert compose_run(WASTE, *SMALL).context == 64


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("scheduler.preemption=swap", "systems=[orca-max,paged]"), "no CPU pool"),
        (("model=opt-66b", "model.tp=2", "engine=lean", "systems=[paged]"), "do not fit"),
    ],
)
def test_who_cannot_serve_is_refused_before_anybody_is_replayed(overrides: tuple[str, ...], said: str):
    run = compose_run(WASTE, "arrival.duration_s=10", *overrides)
    with pytest.raises(UserError, match=said):
        Replayer(run)
