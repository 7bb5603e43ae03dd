"""Traces of groups under the modelled clock: jumping and walking agree, books add up after every step, and nothing is
lost, doubled or split.
"""

from dataclasses import fields, replace

import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvarena.allocators.kv_layout import attention_layout
from kvarena.allocators.registry import config_class, make_policy
from kvarena.harness.config import load, typed
from kvarena.harness.engine.engine import Engine
from kvarena.harness.modelled.modelled_executor import ActionPrices, ModelledExecutor
from kvarena.harness.modelled.step_model import StepModel
from kvarena.harness.requests.decoding import GREEDY, DecodingConfig
from kvarena.harness.requests.group import Group
from kvarena.harness.requests.prefix import Prefix
from kvarena.harness.requests.request import Request, RequestState
from kvarena.harness.scheduler.registry import config_class as scheduler_class
from kvarena.harness.scheduler.registry import make_scheduler

MAX_TOKENS = 96
LAYOUT = attention_layout(num_layers=2, num_kv_heads=64, head_size=128)  # a page-group of 64 KB holds 4 tokens
SWAP = {"block_size": 4, "swap_bytes": 150 * LAYOUT.token_bytes}
CHUNKS = {"token_budget": 12, "max_seqs": 12}
SYSTEMS = {
    "paged, vllm": ("paged", {"block_size": 4}, "vllm", {"max_seqs": 12}),
    "paged, vllm, small budget": ("paged", {"block_size": 4}, "vllm", {"max_seqs": 12, "token_budget": 40}),
    "paged, vllm, swap": ("paged", SWAP, "vllm", {"max_seqs": 12}),
    "paged, vllm, little swap": ("paged", SWAP | {"swap_bytes": 30 * LAYOUT.token_bytes}, "vllm", {}),
    "paged, chunked prefill": ("paged", {"block_size": 4, "watermark": 0}, "chunked_prefill", CHUNKS),
    "orca_oracle, orca": ("orca_oracle", {"block_size": 4}, "orca", {}),
    "contiguous, orca": ("contiguous", {}, "orca", {}),
    "paged_reserved, orca": ("paged_reserved", {}, "orca", {}),
    "static, vllm": ("static", {}, "vllm", {}),
    "vattention, vllm": ("vattention", {"page_group": "64KB", "max_rows": 16}, "vllm", {}),
    "vattention, sync": ("vattention", {"page_group": "128KB", "max_rows": 16, "overlap": False}, "vllm", {}),
}
MODEL = StepModel(True, 23_000, 10, 20_000, 900, 31, 3, 50, 5)
PRICES = ActionPrices(77, 501, 499, (9001, 9001), (803, 803), (2, 2))
WAYS = [GREEDY, DecodingConfig("parallel", 2), DecodingConfig("parallel", 4), DecodingConfig("beam", 3)]
WAYS += [DecodingConfig("beam", 2, survival="one"), DecodingConfig("beam", 4, survival="all")]

SHAPES = st.tuples(st.integers(1, 30), st.integers(1, 35), st.integers(0, 400_000), st.sampled_from(WAYS))
TRACES = st.lists(SHAPES, min_size=1, max_size=12)
HEAVY = [(1 + 7 * i % 30, 1 + 11 * i % 35, 5000 * (i % 3), WAYS[i % 6]) for i in range(30)]


def requests_of(shapes, prefix=None):
    requests, now = [], 0
    for prompt, output, gap, decoding in shapes:
        first = len(requests)
        whole = prompt + (prefix.tokens if prefix else 0)
        gang = [Request(first + i, whole, output, now, decoding=decoding, prefix=prefix) for i in range(decoding.n)]
        if len(gang) > 1:
            Group(gang)
        requests += gang
        now += gap
    return requests


def replay(system, shapes, *, jump, prefix=None):
    """One replay, checked after every step."""
    allocator, options, name, limits = SYSTEMS[system]
    config = replace(typed(config_class(allocator), load("allocator", allocator), "allocator"), **options)
    policy = make_policy(config, LAYOUT, 260 * LAYOUT.token_bytes + 5, MAX_TOKENS)
    scheduler = make_scheduler(scheduler_class(name)(name=name, **limits), policy, MAX_TOKENS)
    complete, rank = scheduler.complete, scheduler.rank

    def checked(plan, now_ps):
        policy.check_integrity()
        for part in (plan.decodes, plan.preempted, plan.swapped_out, plan.swapped_in, scheduler.running):
            check_whole(part)
        assert all(policy.length(r.seq_id) == r.computed + plan.steps for r in plan.decodes), "one position for each"
        complete(plan, now_ps)
        policy.check_integrity()

    def ranked(survivors):
        rank(survivors)
        policy.check_integrity()

    scheduler.complete, scheduler.rank = checked, ranked
    prefixes = [prefix] if prefix else []
    done = Engine(scheduler, ModelledExecutor(MODEL, PRICES), jump=jump, prefixes=prefixes).run(
        requests_of(shapes, prefix)
    )
    if prefix:
        policy.release(prefix.prefix_id)
    assert policy.usage().live == 0, "a finished replay leaks nothing"
    return done


def check_whole(part):
    """All of a group, or none, once each."""
    ids = [r.seq_id for r in part]
    assert len(set(ids)) == len(ids)
    for request in part:
        if request.group is not None:
            assert set(request.group.seq_ids) <= set(ids)
            assert len({(m.generated, m.state) for m in request.group.members}) == 1


@pytest.mark.parametrize("system", SYSTEMS)
@settings(max_examples=5, deadline=None)
@given(shapes=TRACES)
@example(shapes=HEAVY)
def test_both_clocks_agree_on_groups(system, shapes):
    walked, jumped = (replay(system, shapes, jump=jump) for jump in (False, True))
    for a, b in zip(walked.requests, jumped.requests, strict=True):
        assert all(getattr(a, f.name) == getattr(b, f.name) for f in fields(a) if f.name != "group")
    assert walked.resumed_gaps_ps == jumped.resumed_gaps_ps
    rows, steps = jumped.steps.to_frame(), walked.steps.to_frame()
    sums = steps.groupby(rows.index.repeat(rows.steps)).sum()
    for column in ("steps", "duration_ps", "stall_ps", "live", "rounding", "free", "shared_bytes", "actions"):
        pd.testing.assert_series_equal(sums[column], rows[column], check_names=False)


@pytest.mark.parametrize("system", SYSTEMS)
def test_members_end_together_or_are_refused_together(system):
    done = replay(system, HEAVY, jump=True)
    gangs = {}
    for request in done.requests:
        gangs.setdefault(request.request_id, []).append(request)
    assert len(gangs) == len(HEAVY)
    for gang in gangs.values():
        assert len({(r.state, r.finish_ps, r.first_token_ps, r.generated, r.num_preemptions) for r in gang}) == 1
        assert gang[0].state in (RequestState.FINISHED, RequestState.REFUSED)
        assert gang[0].state is RequestState.REFUSED or gang[0].generated == gang[0].output_tokens
    assert sum(gang[0].state is RequestState.FINISHED for gang in gangs.values()) > 10


@pytest.mark.parametrize("system", ["paged, vllm", "paged, vllm, swap", "paged, chunked prefill", "vattention, vllm"])
def test_a_shared_prefix_saves_its_prefills(system):
    prefix = Prefix(-1, 10)
    shared = replay(system, HEAVY[:20], jump=True, prefix=prefix)
    again = replay(system, [(p + 10, *rest) for p, *rest in HEAVY[:20]], jump=True)
    fed, fed_again = (done.steps.to_frame().prefill_tokens.sum() for done in (shared, again))
    assert fed < fed_again
    assert all(r.state is RequestState.FINISHED for r in shared.requests)
