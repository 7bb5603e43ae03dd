import random
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest

from kvarena.errors import UserError
from kvarena.harness.config import load, names, typed
from kvarena.harness.paths import CONF
from kvarena.harness.requests.workload import make_workload
from kvarena.harness.trace import TraceConfig, load_trace
from kvarena.harness.trace.arrival import PS, ArrivalConfig

SHAREGPT = TraceConfig(table="sharegpt", filter="paper_artifact")


def poisson(**fields):
    return ArrivalConfig(process="poisson", rate=2.0, **fields)


def sharegpt_file(data_file):
    return TraceConfig(path=str(data_file("sharegpt_lengths.csv")), filter="paper_artifact")


@pytest.mark.parametrize("first", [720, 7200])
def test_a_trace_is_the_first_pairs_of_the_file(data_file, first):
    config = sharegpt_file(data_file)
    stated = pd.read_csv(config.path)
    stated = stated[stated.prompt_tokens + stated.output_tokens < 2048][:first]  # the artifact's filter
    trace = load_trace(config, num_requests=first)
    assert trace.prompt_tokens.tolist() == stated.prompt_tokens.tolist()
    assert trace.output_tokens.tolist() == stated.output_tokens.tolist()


def test_the_artifacts_trace_of_fig_12a(data_file):
    """OPT-13B at 2 requests/s, drawn as there: from Python's and numpy's global generators."""
    config = sharegpt_file(data_file)
    ours = make_workload(config, ArrivalConfig(process="artifact", rate=2.0, duration_s=3600))
    random.seed(0)
    np.random.seed(0)
    counts = np.random.poisson(lam=2.0 * (10 / 1000), size=360_000)
    trace = load_trace(config)
    pairs = list(zip(trace.prompt_tokens, trace.output_tokens, strict=True))[: counts.sum()]
    random.shuffle(pairs)
    assert len(ours) == len(pairs) == 7280
    assert list(zip(ours.prompt_tokens, ours.output_tokens, strict=True)) == pairs
    assert (ours.arrival_ps == np.repeat(np.arange(360_000) * (PS // 100), counts)).all()


def test_the_artifact_repeats_a_short_file(tmp_path):
    path = tmp_path / "three.csv"
    path.write_text("prompt_tokens,output_tokens\n1,1\n2,1\n3,1\n")
    arrival = ArrivalConfig(process="artifact", rate=5.0, duration_s=60)
    workload = make_workload(TraceConfig(path=str(path)), arrival)
    counts = np.bincount(workload.prompt_tokens)[1:]
    assert counts.sum() == len(workload) > 200
    assert counts.max() - counts.min() <= 1
    assert workload.provenance["trace"]["rounds"] == -(-len(workload) // 3)


def test_as_many_requests_as_arrive():
    workload = make_workload(SHAREGPT, poisson(duration_s=100))
    assert len(workload) == len(workload.arrival_ps) == workload.provenance["trace"]["requests"]
    assert workload.arrival_s[-1] < 100
    assert workload.rate == pytest.approx(2, rel=0.3)


def test_as_many_arrivals_as_requests():
    config = TraceConfig(table="sharegpt", num_requests=123)
    assert len(make_workload(config, poisson())) == 123
    assert len(make_workload(config, poisson(duration_s=1e6))) == 123


def test_rates_share_requests():
    slow, fast = (make_workload(SHAREGPT, ArrivalConfig("poisson", rate, duration_s=60)) for rate in (1.0, 4.0))
    assert slow.prompt_tokens.tolist() == fast.prompt_tokens[: len(slow)].tolist()


def test_seeds():
    first, again = make_workload(SHAREGPT, poisson()), make_workload(SHAREGPT, poisson())
    assert first.prompt_tokens.tolist() == again.prompt_tokens.tolist()
    assert first.arrival_ps.tolist() == again.arrival_ps.tolist()
    both = make_workload(TraceConfig(table="sharegpt", filter="paper_artifact", seed=1), poisson())
    assert both.provenance["arrival"]["seed"] == 1  # arrivals follow the trace's seed unless they have their own
    assert (both.arrival_ps != first.arrival_ps).all()
    arrivals = make_workload(SHAREGPT, poisson(seed=1))
    assert arrivals.prompt_tokens.tolist() == first.prompt_tokens.tolist()
    assert arrivals.arrival_ps.tolist() == both.arrival_ps.tolist()


def test_recorded_stamps_are_kept(data_file):
    config = TraceConfig(path=str(data_file("azure_code.csv")))
    workload = make_workload(config, ArrivalConfig(process="recorded"))
    trace = load_trace(config)
    assert workload.arrival_ps.tolist() == [round(stamp * 10**6) * 10**6 for stamp in trace.arrival_s]
    assert workload.prompt_tokens.tolist() == trace.prompt_tokens.tolist()
    minute = make_workload(config, ArrivalConfig(process="recorded", duration_s=60))
    assert len(minute) == (trace.arrival_s < 60).sum()


def test_recorded_stamps_come_in_order(tmp_path):
    path = tmp_path / "t.csv"
    same = [*range(2, 60)]  # of one stamp, they keep the file's order
    path.write_text(
        "arrival_s,prompt_tokens,output_tokens\n3,1,1\n" + "".join(f"1,{n},1\n" for n in same) + "0.5,99,1\n"
    )
    workload = make_workload(TraceConfig(path=str(path)), ArrivalConfig(process="recorded"))
    assert workload.prompt_tokens.tolist() == [99, *same, 1]
    assert workload.arrival_s.tolist() == [0.5, *[1] * len(same), 3]


def test_hash_ids_follow_their_requests(data_file):
    config = TraceConfig(path=str(data_file("mooncake_synthetic.jsonl")), keep_hash_ids=True, shuffle=True, seed=3)
    workload = make_workload(config, ArrivalConfig(process="recorded", duration_s=30))
    assert workload.hash_ids is not None
    blocks = np.array([len(ids) for ids in workload.hash_ids])
    assert (np.abs(blocks - workload.prompt_tokens / 512) <= 1).all()


def test_all_at_once():
    workload = make_workload(
        TraceConfig(prompt_tokens=5, output_tokens=2, num_requests=4), ArrivalConfig("all_at_once")
    )
    assert workload.arrival_ps.tolist() == [0, 0, 0, 0]
    assert workload.rate == float("inf")


def test_every_trace_begins_with_every_key():
    base = load("base", "trace")
    assert base == asdict(TraceConfig())  # a key that it lacks could not be overridden
    for name in names("trace"):
        assert "defaults: [/base/trace@_here_, _self_]" in (CONF / "trace" / f"{name}.yaml").read_text(), name


@pytest.mark.parametrize("name", names("trace"))
def test_every_trace_of_conf_loads(name):
    config = typed(TraceConfig, load("trace", name), "trace")
    assert config.name == name
    assert len(make_workload(config, poisson(duration_s=20), max_tokens=262_144)) > 20


def test_nothing_arrives(tmp_path):
    with pytest.raises(UserError, match=r"arrival.duration_s=0.001"):
        make_workload(SHAREGPT, poisson(duration_s=0.001))


def test_recorded_needs_stamps(tmp_path):
    with pytest.raises(UserError, match=r"arrival=recorded.*sharegpt"):
        make_workload(SHAREGPT, ArrivalConfig(process="recorded"))
    path = tmp_path / "t.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,1,1\n")
    with pytest.raises(UserError, match=r"trace.num_requests=2"):
        make_workload(TraceConfig(path=str(path), num_requests=2), ArrivalConfig(process="recorded"))
