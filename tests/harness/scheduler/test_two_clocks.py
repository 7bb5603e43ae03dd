"""One loop, two clocks: a real replay, and the same decisions again from its step times; the tokens stay the same."""

from dataclasses import replace

import pytest
from two_clocks import Keeper, Scripted, noted_decisions

from kvarena.allocators.registry import config_class, make_policy
from kvarena.allocators.stores import make_store
from kvarena.harness.config import load, typed
from kvarena.harness.engine.clock import ModelledClock, WallClock
from kvarena.harness.engine.engine import Engine
from kvarena.harness.model import ModelConfig
from kvarena.harness.model.build import build_model
from kvarena.harness.requests.request import Request, RequestState
from kvarena.harness.scheduler.registry import config_class as scheduler_class
from kvarena.harness.scheduler.registry import make_scheduler
from kvarena.harness.scheduler.step import Executor, StepTime
from kvarena.kernels.registry import get_kernel

CONFIG = typed(ModelConfig, load("model", "tiny-llama"), "model")
LAYOUT = CONFIG.kv_layout()
LENGTHS = [(23, 14), (7, 30), (40, 9), (3, 25), (31, 20), (12, 28), (17, 5), (26, 22), (5, 1), (9, 33), (38, 12)]
MAX_TOKENS = 64
SWAP_BYTES = 400 * LAYOUT.token_bytes
CHUNKS = {"token_budget": 16, "max_seqs": 16}
SYSTEMS = {
    "recomputing": ("paged", {"block_size": 4}, "vllm", {}, 150),
    "swapping": ("paged", {"block_size": 4, "swap_bytes": SWAP_BYTES}, "vllm", {"preemption": "swap"}, 150),
    "in chunks": ("paged", {"block_size": 4, "watermark": 0}, "chunked_prefill", CHUNKS, 150),
    "vattention": ("vattention", {"page_group": "64KB", "max_rows": 12}, "vllm", {}, 5120),
    "orca": ("orca_oracle", {"block_size": 4}, "orca", {}, 300),
    "static": ("static", {}, "vllm", {}, 300),
}


@pytest.fixture(scope="module")
def model():
    return build_model(CONFIG, "cpu")


def serve(system, executor_of, gap_ps=10**9):
    """Serve LENGTHS, one every millisecond by default. Returns the replay, its decisions and the executor."""
    allocator, options, name, limits, tokens = SYSTEMS[system]
    config = replace(typed(config_class(allocator), load("allocator", allocator), "allocator"), **options)
    policy = make_policy(config, LAYOUT, tokens * LAYOUT.token_bytes, MAX_TOKENS)
    scheduler = make_scheduler(scheduler_class(name)(name=name, **limits), policy, MAX_TOKENS)
    decisions = noted_decisions(scheduler)
    executor = executor_of(policy)
    requests = [Request(i, p, n, arrival_ps=i * gap_ps) for i, (p, n) in enumerate(LENGTHS)]
    return Engine(scheduler, executor, jump=False).run(requests), decisions, executor


def measured(system, model, **load):
    def executor_of(policy):
        store = make_store(policy, CONFIG.num_layers, CONFIG.num_kv_heads, CONFIG.head_size, CONFIG.dtype)
        return Keeper(model, store, get_kernel("numba"))

    done, decisions, executor = serve(system, executor_of, **load)
    executor.store.close()
    return done, decisions, executor.finished


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_same_step_times_give_the_same_decisions(system, model):
    done, decisions, _ = measured(system, model)
    rows = done.steps.to_frame()
    replayed, again, _ = serve(system, lambda policy: Scripted(rows.duration_ps.tolist()))
    assert again == decisions
    assert [r.finish_ps for r in replayed.requests] == [r.finish_ps for r in done.requests]
    assert replayed.steps.to_frame().start_ps.tolist() == rows.start_ps.tolist()
    assert all(r.state is RequestState.FINISHED for r in done.requests)


def test_every_path_through_memory_yields_the_same_tokens(model):
    tokens, preempted = {}, {}
    for system in SYSTEMS:
        _, decisions, tokens[system] = measured(system, model, gap_ps=0)
        preempted[system] = sum(len(d[1]) for d in decisions), sum(len(d[2]) for d in decisions)
    assert preempted["recomputing"][0] > 0
    assert preempted["swapping"][1] > 0
    assert preempted["in chunks"][0] > 0
    for system in SYSTEMS:
        assert tokens[system] == tokens["static"], system
    assert [len(tokens["static"][i]) for i in range(len(LENGTHS))] == [output for _, output in LENGTHS]


class Sleeper(Executor):
    """A real executor without a model."""

    def execute(self, plan):
        return StepTime(0)


def test_the_wall_counts_what_the_step_does_not_say():
    done, _, _ = serve("static", lambda policy: Sleeper())
    rows = done.steps.to_frame()
    assert (rows.duration_ps > 0).all(), "scheduling takes time"
    assert all(r.finish_ps > r.arrival_ps for r in done.requests)


@pytest.mark.parametrize("clock", [ModelledClock(), WallClock()], ids=["modelled", "wall"])
def test_idle_time_is_skipped_not_slept(clock):
    clock.skip_to(10**15)
    assert clock.now_ps == 10**15
    clock.pass_step(StepTime(1000))
    assert 10**15 < clock.now_ps < 10**15 + 10**14
