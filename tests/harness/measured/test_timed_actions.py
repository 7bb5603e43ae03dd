"""Copies of a step are waited for, so that its stall holds them: a GPU's are only launched."""

import pytest
import torch

from kvarena.allocators.paged.policy import PagedConfig, PagedPolicy
from kvarena.allocators.policy import Admission
from kvarena.allocators.stores import make_store
from kvarena.harness.measured import torch_executor
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


def test_a_step_waits_around_its_copies_and_for_nothing_else(monkeypatch):
    model = build_model(load_preset("tiny-llama"), "cpu")
    config = model.config
    layout = config.kv_layout()
    policy = PagedPolicy(
        PagedConfig(block_size=4, swap_bytes="1MB"), layout, 40 * 4 * layout.token_bytes, max_tokens=64
    )
    store = make_store(policy, config.num_layers, config.num_kv_heads, config.head_size, config.dtype)
    executor, events = TorchExecutor(model, store, get_kernel("numba")), []
    apply = store.apply
    store.apply_in_background = lambda actions: None
    store.apply = lambda actions: events.append("apply") or apply(actions)
    monkeypatch.setattr(torch_executor, "wait_for", lambda device: events.append("wait"))

    def run(**plan):
        events.clear()
        executor.execute(StepPlan(actions=policy.drain(), **plan))
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
    assert decode(first, second) == ["wait", "apply", "wait"], "the shared block is copied"
    assert decode(first, second) == ["apply"]
    policy.swapping.swap_out([1])
    policy.swapping.swap_in([1])
    assert decode(first, second) == ["wait", "apply", "wait"], "blocks went to the host and back"
    store.close()
