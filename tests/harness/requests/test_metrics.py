"""Metrics of replays small enough to work out by hand."""

import numpy as np
import pandas as pd
import pytest

from kvarena.allocators.kv_layout import attention_layout
from kvarena.allocators.paged.policy import PagedConfig, PagedPolicy
from kvarena.allocators.reservation.fastertransformer import FasterTransformerConfig, FasterTransformerPolicy
from kvarena.errors import UserError
from kvarena.harness.engine.engine import Engine
from kvarena.harness.engine.step_log import StepLog
from kvarena.harness.modelled.modelled_executor import ModelledExecutor
from kvarena.harness.modelled.step_model import StepModel
from kvarena.harness.record.metrics import goodput, inter_token_quantiles, latencies, makespan_s, rate_asked, summarize
from kvarena.harness.requests.decoding import DecodingConfig
from kvarena.harness.requests.request import Request, RequestState
from kvarena.harness.requests.request_list import make_requests
from kvarena.harness.requests.request_log import request_frame
from kvarena.harness.requests.workload import Workload
from kvarena.harness.scheduler.registry import config_class, make_scheduler

S = 10**12
LAYOUT = attention_layout(1, 1, 8)
ONE_SECOND_STEPS = StepModel(False, S, 0, 0, 0, 0)


def scheduler_of(blocks, name="vllm", **limits):
    block_bytes = 4 * LAYOUT.token_bytes
    policy = PagedPolicy(
        PagedConfig(block_size=4, watermark=0, swap_bytes=20 * block_bytes), LAYOUT, blocks * block_bytes, max_tokens=64
    )
    return make_scheduler(config_class(name)(name=name, **limits), policy, 64)


def replay(requests, blocks=100, model=ONE_SECOND_STEPS):
    return Engine(scheduler_of(blocks), ModelledExecutor(model)).run(requests)


def test_two_requests_by_hand():
    # 0 runs in the steps that end at 1, 2, 3, 4 s; 1 arrives at 1.5 s and joins the step from 2 to 3 s.
    done = replay([Request(0, 5, 4), Request(1, 3, 2, arrival_ps=3 * S // 2)])
    requests, steps = request_frame(done.requests), done.steps.to_frame()
    table = latencies(requests)
    assert table.e2el_s.tolist() == [4, 2.5]
    assert table.normalized_s.tolist() == [1, 1.25]
    assert table.ttft_s.tolist() == [1, 1.5]
    assert table.tpot_s.tolist() == [1, 1]
    assert table.queueing_s.tolist() == [0, 0.5]
    assert makespan_s(requests) == 4
    assert rate_asked(requests) == pytest.approx(1 / 1.5)
    assert goodput(requests, {"ttft_s": 1.2}) == 0.25
    assert goodput(requests, {"ttft_s": 2, "tpot_s": 0.5}) == 0
    summary = summarize(requests, steps, done.resumed_gaps_ps)
    assert summary["normalized_latency_s"] == 1.125
    assert summary["itl_p50_s"] == summary["itl_p99_s"] == 1
    assert summary["finished"] == 2
    assert summary["rate_reached_per_s"] == 0.5


def test_p50_and_p99_are_what_their_names_say():
    """A hundred and one requests and gaps of 0, 1, 4, .. 100^2 s: the q-th percentile is q^2 seconds."""
    at_s = np.arange(101) ** 2
    times = {"arrival_ps": 0, "scheduled_ps": at_s * S, "first_token_ps": at_s * S, "finish_ps": 11 * at_s * S}
    counts = {"output_tokens": 11, "prompt_tokens": 1, "stall_ps": at_s * S, "num_preemptions": 0, "refusal": ""}
    steps = pd.DataFrame({"duration_ps": at_s * S, "steps": 1, "slope_ps": 0, "decodes": 1, "swapped_in": 0})
    found = summarize(pd.DataFrame(times | counts), steps, [])
    scale = {"itl": 1, "ttft": 1, "tpot": 1, "queueing": 1, "stall": 1, "e2el": 11}
    for name, times_s in scale.items():
        assert found[f"{name}_p50_s"] == pytest.approx(50**2 * times_s)
        assert found[f"{name}_p99_s"] == pytest.approx(99**2 * times_s)
    assert found["normalized_latency_s"] == pytest.approx(sum(q**2 for q in range(101)) / 101)


def test_a_request_of_several_sequences_counts_once():
    """Two of 10 and 20 tokens in, 5 out: the first has three samples, which were preempted twice."""
    counts = {"prompt_tokens": [10] * 3 + [20], "num_preemptions": [2] * 3 + [0], "request_id": [0, 0, 0, 3]}
    times = {"arrival_ps": S, "scheduled_ps": S, "first_token_ps": 2 * S, "finish_ps": 5 * S, "stall_ps": 0}
    frame = pd.DataFrame(counts).assign(**times, output_tokens=5, refusal="")
    found = summarize(frame, StepLog().to_frame(), [])
    assert (found["makespan_s"], found["finished"], found["preemptions"]) == (4, 2, 2)
    assert found["output_tokens_per_s"] == 4 * 5 / 4
    assert found["total_tokens_per_s"] == (10 + 20 + 4 * 5) / 4


def test_one_token_has_no_tpot_and_keeps_any_limit_on_it():
    requests = request_frame(replay([Request(0, 5, 1)]).requests)
    assert latencies(requests).tpot_s.isna().all()
    assert goodput(requests, {"tpot_s": 1e-9}) == 1


def test_refused_requests_are_counted_and_enter_nothing_else():
    done = replay([Request(0, 60, 30), Request(1, 5, 4, arrival_ps=S), Request(2, 5, 4, arrival_ps=S)])
    summary = summarize(request_frame(done.requests), done.steps.to_frame(), [])
    assert (summary["finished"], summary["refused"]) == (2, 1)
    assert (summary["normalized_latency_s"], summary["makespan_s"]) == (1, 4)


def test_unknown_limits_are_refused():
    with pytest.raises(UserError, match=r"'latency'.*normalized_s, e2el_s, ttft_s"):
        goodput(request_frame(replay([Request(0, 5, 4)]).requests), {"latency": 1})


def note_tokens(scheduler):
    """Times of all tokens, by request, filled in as the replay goes on."""
    complete, times = scheduler.complete, {}

    def noting(plan, now_ps):
        before = {r: r.generated for r in scheduler.running}
        complete(plan, now_ps)
        for request, generated in before.items():
            if request.generated > generated:
                times.setdefault(request.seq_id, []).append(now_ps)

    scheduler.complete = noting
    return times


@pytest.mark.parametrize(
    ("name", "limits"),
    [("vllm", {}), ("vllm", {"preemption": "swap"}), ("chunked_prefill", {"token_budget": 9, "max_seqs": 9})],
    ids=["recomputing", "swapping", "in chunks"],
)
def test_pooled_gaps_are_those_of_every_token(name, limits):
    """Gaps from the step log, stretches and preemptions included, against times noted token by token."""
    lengths = [(9, 20), (3, 30), (14, 8), (5, 25), (7, 2), (1, 28), (11, 16), (30, 9)] * 3
    model = StepModel(False, S, 1000, 5 * S, 10**11, 10**9)

    def requests():
        return [Request(i, p, n, arrival_ps=i * S) for i, (p, n) in enumerate(lengths)]

    walking = scheduler_of(20, name, **limits)
    times = note_tokens(walking)
    Engine(walking, ModelledExecutor(model), jump=False).run(requests())
    gaps = np.sort(np.concatenate([np.diff(tokens) for tokens in times.values()])) / S
    done = Engine(scheduler_of(20, name, **limits), ModelledExecutor(model)).run(requests())
    assert max(r.num_preemptions for r in done.requests) > 1
    assert len(done.resumed_gaps_ps) > 0
    for q in (0.01, 0.5, 0.9, 0.99, 1):
        [ours] = inter_token_quantiles(done.steps.to_frame(), done.resumed_gaps_ps, [q])
        assert ours == np.quantile(gaps, q, method="inverted_cdf")


def test_rows_that_only_pad_a_batch_have_no_gaps():
    """FasterTransformer: a request of 2 tokens rides along with one of 101, whose gaps are the only others."""
    policy = FasterTransformerPolicy(FasterTransformerConfig(), LAYOUT, 1 << 20, max_tokens=128)
    scheduler = make_scheduler(config_class("fastertransformer")(), policy, 128)
    done = Engine(scheduler, ModelledExecutor(StepModel(False, S, 0, 0, 0, 1))).run(
        [Request(0, 4, 101), Request(1, 4, 2)]
    )
    steps = done.steps.to_frame()
    assert (steps.decodes * steps.steps).sum() == 100 + 1
    assert (steps.requests * steps.steps).sum() == 101 + 2
    assert (steps.output_tokens * steps.steps).sum() == 101 + 2
    [second] = inter_token_quantiles(steps, [], [2 / 101])
    [third] = inter_token_quantiles(steps, [], [3 / 101])
    assert second < third, "two gaps end with the first decode, and one with each of the others"


@pytest.mark.parametrize(
    ("name", "limits"),
    [
        ("vllm", {"preemption": "recompute"}),
        ("vllm", {"preemption": "swap"}),
        ("chunked_prefill", {"token_budget": 9, "max_seqs": 9}),
    ],
    ids=["recomputing", "swapping", "in chunks"],
)
def test_whom_a_step_leaves_in_line_is_whom_nobody_serves(name, limits):
    """The log's `waiting`, `requests` and tokens, against what the requests say of themselves step by step."""
    scheduler = scheduler_of(20, name, **limits)
    ways = [DecodingConfig(), DecodingConfig("parallel", n=3)]
    lengths = [(9, 20), (3, 30), (14, 8), (5, 25), (7, 2), (1, 28), (11, 16), (30, 9)] * 3
    workload = Workload(*(np.array(x) for x in zip(*lengths, strict=True)), np.arange(len(lengths)) * S)
    requests = make_requests(workload, [ways[i % 2] for i in range(len(lengths))])
    schedule, submit, seen, arrived = scheduler.schedule, scheduler.submit, [], []
    scheduler.submit = lambda request: arrived.append(request) or submit(request)

    def watched(now_ps):
        plan = schedule(now_ps)
        states = [r.state for r in arrived]
        served = {r.request_id for r in [*plan.decodes, *(chunk.request for chunk in plan.prefills)]}
        in_line = states.count(RequestState.WAITING) + states.count(RequestState.SWAPPED)
        behind = getattr(scheduler, "_behind", None)
        tokens = sum(r.generated for r in requests)
        seen.append((in_line - (behind is not None), len(served), tokens))
        return plan

    scheduler.schedule = watched
    steps = Engine(scheduler, ModelledExecutor(ONE_SECOND_STEPS), jump=False).run(requests).steps.to_frame()
    waiting, batch, tokens = zip(*seen, strict=True)
    assert max(waiting) > 2
    assert steps.waiting.tolist() == list(waiting)
    assert steps.requests.tolist() == list(batch)
    assert steps.output_tokens.tolist() == np.diff([*tokens, sum(r.generated for r in requests)]).tolist()
    assert (steps.decodes > steps.requests).any(), "members of a group are sequences of one request"


def test_no_gaps_at_all():
    done = replay([Request(0, 5, 1)])
    assert np.isnan(inter_token_quantiles(done.steps.to_frame(), [], [0.5])).all()
