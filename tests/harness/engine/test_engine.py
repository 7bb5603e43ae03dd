"""The serving loop: who is told what, what is booked, and what it refuses to do."""

import pytest

from kvarena.allocators.kv_layout import attention_layout
from kvarena.allocators.paged.policy import PagedConfig, PagedPolicy
from kvarena.harness.engine.engine import Engine
from kvarena.harness.engine.step_log import COLUMNS
from kvarena.harness.modelled.modelled_executor import ActionPrices, ModelledExecutor
from kvarena.harness.modelled.step_model import StepModel
from kvarena.harness.requests.request import Request, RequestState
from kvarena.harness.requests.request_log import request_frame
from kvarena.harness.scheduler.vllm import VllmConfig, VllmScheduler

LAYOUT = attention_layout(1, 1, 8)
BLOCK_BYTES = 4 * LAYOUT.token_bytes
UNIT_STEPS = StepModel(False, 100, 0, 0, 0, 0)


def engine(blocks=100, prices=None, preemption="auto", swap_blocks=0, executor=ModelledExecutor, **options):
    policy = PagedPolicy(
        PagedConfig(block_size=4, watermark=0, swap_bytes=swap_blocks * BLOCK_BYTES),
        LAYOUT,
        blocks * BLOCK_BYTES,
        max_tokens=64,
    )
    scheduler = VllmScheduler(policy, VllmConfig(preemption=preemption), 64)
    return Engine(scheduler, executor(UNIT_STEPS, prices), **options)


def test_requests_may_come_in_any_order_and_ties_go_by_id():
    requests = [Request(2, 4, 2, arrival_ps=50), Request(1, 4, 2, arrival_ps=0), Request(0, 4, 2, arrival_ps=50)]
    done = engine().run(requests)
    assert [r.seq_id for r in done.requests] == [1, 0, 2]
    assert [r.finish_ps for r in done.requests] == [200, 300, 300], "those at 50 wait for the step that ends at 100"


def test_an_idle_clock_skips_to_the_next_arrival():
    done = engine().run([Request(0, 4, 1), Request(1, 4, 1, arrival_ps=10**15)])
    assert [r.finish_ps for r in done.requests] == [100, 10**15 + 100]
    assert done.steps.to_frame().start_ps.tolist() == [0, 10**15]


def test_no_requests_and_only_refused_ones_end_at_once():
    assert engine().run([]).requests == []
    done = engine().run([Request(0, 60, 60)])
    assert len(done.steps) == 0
    assert list(done.steps.to_frame().columns) == list(COLUMNS)
    frame = request_frame(done.requests)
    assert frame.state.tolist() == ["refused"]
    assert frame.finish_ps.isna().all()
    assert "context of 64" in frame.refusal[0]


def test_a_stall_is_booked_on_everyone_in_the_step():
    prices = ActionPrices(swap_out_ps=7, swap_in_ps=30)
    loop = engine(6, prices, "swap", swap_blocks=8)
    first, second, third = loop.run([Request(0, 6, 3), Request(1, 10, 4), Request(2, 2, 2)]).requests
    rows = loop._log.to_frame()
    assert (rows.swapped_out.sum(), rows.swapped_in.sum()) == (1, 1)
    assert rows.stall_ps.tolist() == [0, 7, 0, 30], "one block each way"
    assert (first.stall_ps, second.stall_ps, third.stall_ps) == (7, 37, 30)
    assert rows.duration_ps.tolist() == [100, 107, 100, 130]


def test_the_executor_hears_of_every_end_once():
    heard = []

    class Listener(ModelledExecutor):
        def finish(self, request):
            assert request.state is RequestState.FINISHED
            heard.append(request.seq_id)

    engine(executor=Listener).run([Request(i, 4, 3 - i, arrival_ps=0) for i in range(3)])
    assert heard == [2, 1, 0]


def test_waiting_counts_whom_a_step_leaves_in_line():
    rows = engine(5).run([Request(0, 8, 2), Request(1, 8, 2), Request(2, 2, 1)]).steps.to_frame()
    assert rows.waiting.tolist() == [0, 1, 0], "all three fit; one is preempted; it is back"
    assert rows.preempted.tolist() == [0, 1, 0]


def test_a_loop_that_cannot_go_on_says_so():
    loop = engine(10)
    loop.scheduler.policy.refusal = lambda admission: ""
    with pytest.raises(RuntimeError, match="nobody runs, and Request"):
        loop.run([Request(0, 50, 2)])
