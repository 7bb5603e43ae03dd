"""A step's stall holds its copies, by the device's own clock: a GPU's are only launched, and nobody waits for them."""

import pytest
import torch

from kvarena.allocators.paged.policy import PagedConfig, PagedPolicy
from kvarena.allocators.policy import Admission
from kvarena.allocators.stores import make_store
from kvarena.harness.measured.stopwatch import Stopwatch
from kvarena.harness.measured.timed_call import wait_for
from kvarena.harness.measured.torch_executor import TorchExecutor
from kvarena.harness.model import load_preset
from kvarena.harness.model.build import build_model
from kvarena.harness.requests.request import Request
from kvarena.harness.scheduler.step import PrefillChunk, StepPlan
from kvarena.kernels.registry import get_kernel


@pytest.mark.parametrize(("device", "waits"), [("cuda", 1), ("cpu", 0)])
def test_only_a_gpu_is_waited_for(device, waits, monkeypatch):
    heard = []
    monkeypatch.setattr(torch.cuda, "synchronize", heard.append)
    wait_for(torch.device(device))
    assert len(heard) == waits


COPIED = ["record", "apply", "record", "wait"]  # the wait is the reading's, when the step has ended


class Event:
    """One of a device that takes 3 s for whatever lies between two of them."""

    def __init__(self, log, done):
        self._log, self._done = log, done

    def record(self):
        self._log.append("record")

    def query(self):
        return self._done

    def elapsed_time(self, other):
        return 3000.0


@pytest.fixture
def events(monkeypatch):
    """Makes a stopwatch a GPU's; what has been recorded. `events.done`: the device has done all that it was given."""

    class Log(list):
        done = False

    log = Log()
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(log, log.done))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    return log


@pytest.mark.parametrize("done", [True, False])
def test_events_hold_the_devices_time_only_where_its_queue_never_runs_empty(events, done):
    events.done = done
    watch = Stopwatch(torch.device("cuda"))
    for _ in range(2):
        with watch.phase("append"):
            pass
        assert watch.read() == {"append": 3.0}
        assert watch.queue_full  # one phase says nothing of what lay between two
    for name in ("append", "attention"):
        with watch.phase(name):
            pass
    assert watch.read() == {"append": 3.0, "attention": 3.0}
    assert watch.queue_full is not done


def test_a_steps_copies_are_timed_by_events_and_nothing_else_is(monkeypatch, events):
    model = build_model(load_preset("tiny-llama"), "cpu")
    config = model.config
    layout = config.kv_layout()
    policy = PagedPolicy(
        PagedConfig(block_size=4, swap_bytes="1MB"), layout, 40 * 4 * layout.token_bytes, max_tokens=64
    )
    store = make_store(policy, config.num_layers, config.num_kv_heads, config.head_size, config.dtype)
    executor = TorchExecutor(model, store, get_kernel("numba"))
    executor._copying = Stopwatch(torch.device("cuda"))
    apply = store.apply
    store.apply_in_background = lambda actions: None
    store.apply = lambda actions: events.append("apply") or apply(actions)

    def run(**plan):
        events.clear()
        time = executor.execute(StepPlan(actions=policy.drain(), **plan))
        assert (time.stall_ps == 3 * 10**12 == 10**12 * executor.phases["actions"]) == ("record" in events)
        return list(events)

    def decode(*requests):
        for request in requests:
            assert policy.grow(request.seq_id)
        seen = run(decodes=list(requests))
        for request in requests:
            request.computed += 1
        return seen

    first, second = Request(0, 6, 20), Request(1, 6, 20)
    assert policy.admit(Admission([first], 6)) is not None
    assert run(prefills=[PrefillChunk(first, 0, 6)]) == ["apply"]
    first.computed = second.computed = 6
    assert decode(first) == ["apply"]
    second.computed = 7
    executor.tokens[1] = list(executor.known(first))
    assert policy.sharing.fork(0, second)
    assert decode(first, second) == COPIED, "the shared block is copied"
    assert decode(first, second) == ["apply"]
    policy.swapping.swap_out([1])
    policy.swapping.swap_in([1])
    assert decode(first, second) == COPIED, "blocks went to the host and back"
    store.close()
