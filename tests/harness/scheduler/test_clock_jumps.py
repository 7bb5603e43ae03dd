"""The jumping clock against the token-by-token one: the same times, decisions, counts and sums, bit for bit."""

from dataclasses import fields, replace

import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvarena.allocators.kv_layout import KVLayout, attention_layout, sliding_layout
from kvarena.allocators.policy import Policy
from kvarena.allocators.registry import config_class, make_policy
from kvarena.harness.config import load, typed
from kvarena.harness.engine.engine import Engine, Replay
from kvarena.harness.modelled.modelled_executor import ActionPrices, ModelledExecutor
from kvarena.harness.modelled.step_model import StepModel
from kvarena.harness.requests.request import Request, RequestState
from kvarena.harness.scheduler.registry import config_class as scheduler_class
from kvarena.harness.scheduler.registry import make_scheduler
from kvarena.harness.scheduler.scheduler import by_arrival

MAX_TOKENS = 96
LAYOUT = attention_layout(num_layers=2, num_kv_heads=64, head_size=128)  # a page-group of 64 KB holds 4 tokens
SYSTEMS = {
    "paged, vllm": ("paged", {"block_size": 4}, "vllm", {}),
    "paged, vllm, swap": (
        "paged",
        {"block_size": 4, "swap_bytes": 96 * LAYOUT.token_bytes},
        "vllm",
        {"preemption": "swap"},
    ),
    "paged, vllm, tight batch": ("paged", {"block_size": 1, "watermark": 0.05}, "vllm", {"max_seqs": 3}),
    "paged, chunked prefill": (
        "paged",
        {"block_size": 4, "watermark": 0},
        "chunked_prefill",
        {"token_budget": 7, "max_seqs": 6},
    ),
    "paged, sarathi": (
        "paged",
        {"block_size": 4},
        "sarathi",
        {"token_budget": 7, "max_seqs": 6, "whole_prompts": True},
    ),
    "vattention, sarathi": (
        "vattention",
        {"page_group": "64KB", "max_rows": 8},
        "sarathi",
        {"token_budget": 9, "max_seqs": 6, "whole_prompts": True},
    ),
    "paged, vllm_v1": ("paged", {"block_size": 16, "watermark": 0}, "vllm_v1", {"token_budget": 64, "max_seqs": 64}),
    "vattention, vllm": ("vattention", {"page_group": "64KB", "max_rows": 8}, "vllm", {}),
    "vattention, sync": ("vattention", {"page_group": "128KB", "max_rows": 8, "overlap": False}, "vllm", {}),
    "vattention, reading past": ("vattention", {"page_group": "64KB", "max_rows": 8, "read_past": 6}, "vllm", {}),
    "static, vllm": ("static", {}, "vllm", {}),
    "orca_max, orca": ("orca_max", {}, "orca", {}),
    "orca_pow2, orca": ("orca_pow2", {"block_size": 4}, "orca", {}),
    "orca_oracle, orca": ("orca_oracle", {"block_size": 4}, "orca", {"max_seqs": 4}),
    "contiguous, orca": ("contiguous", {}, "orca", {}),
    "paged_reserved, orca": ("paged_reserved", {}, "orca", {}),
    "fastertransformer": ("fastertransformer", {"batch_size": 3, "max_padded_tokens": 90}, "fastertransformer", {}),
}
SERIAL = StepModel(False, 12_000, 340, 16_500, 1300, 7)
OVERLAPPED = StepModel(True, 23_000, 10, 20_000, 900, 31, 3, 50, 5)  # the device is slower from 95 tokens on
PRICES = ActionPrices(copy_block_ps=77, swap_out_ps=501, swap_in_ps=499, map_ps=(9001, 9001), unmap_ps=(803, 803))

HEAVY = [(1 + 7 * i % 40, 1 + 11 * i % 55, 5000 * (i % 3)) for i in range(36)]  # everyone is preempted now and then
REQUESTS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 50), st.integers(0, 400_000)), min_size=1, max_size=25)


def policy_of(name: str, options: dict, layout: KVLayout, tokens: int = 200) -> Policy:
    config = replace(typed(config_class(name), load("allocator", name), "allocator"), **options)
    return make_policy(config, layout, tokens * layout.token_bytes + 5, MAX_TOKENS)


def requests_of(lengths: list[tuple[int, int, int]]) -> list[Request]:
    gaps, now, requests = [gap for _, _, gap in lengths], 0, []
    for i, (prompt, output, _) in enumerate(lengths):
        requests.append(Request(seq_id=i, prompt_tokens=prompt, output_tokens=output, arrival_ps=now))
        now += gaps[i]
    return requests


def replay(system: str, lengths: list, model: StepModel, jump: bool, layout: KVLayout = LAYOUT) -> Replay:
    """One replay; after every step the policy recounts itself, and nobody has been overtaken."""
    allocator, options, name, limits = SYSTEMS[system]
    policy = policy_of(allocator, options, layout)
    scheduler = make_scheduler(scheduler_class(name)(name=name, **limits), policy, MAX_TOKENS)
    complete = scheduler.complete

    def checked(plan, now_ps):
        policy.check_integrity()
        assert scheduler.running == sorted(scheduler.running, key=by_arrival)
        if "swap" not in system:  # where the CPU pool is full, a victim may wait while later ones come back
            assert not scheduler.waiting or by_arrival(scheduler.running[-1]) < by_arrival(scheduler.waiting[0])
        complete(plan, now_ps)
        policy.check_integrity()

    scheduler.complete = checked
    result = Engine(scheduler, ModelledExecutor(model, PRICES), jump=jump).run(requests_of(lengths))
    assert policy.usage().live == 0, "a finished replay leaks nothing"
    return result


def folded(walked: pd.DataFrame, jumped: pd.DataFrame) -> pd.DataFrame:
    """Rows of the token-by-token replay, summed over the stretches of the jumping one."""
    stretch = jumped.index.repeat(jumped.steps)
    assert len(stretch) == len(walked)
    sums = walked.groupby(stretch).sum()
    first = walked.groupby(stretch).first()
    for column in ("start_ps", "requests", "decodes", "output_tokens", "waiting"):
        sums[column] = first[column]
    slopes = [sorted(set(d.diff().dropna())) or [0] for _, d in walked.duration_ps.groupby(stretch)]
    assert all(len(values) == 1 for values in slopes), "the steps of a stretch take evenly longer"
    sums["slope_ps"] = [int(values[0]) for values in slopes]
    return sums


@pytest.mark.parametrize("model", [SERIAL, OVERLAPPED], ids=["serial", "overlapped"])
@pytest.mark.parametrize("system", SYSTEMS)
@settings(max_examples=8, deadline=None)
@given(lengths=REQUESTS)
@example(lengths=HEAVY)
def test_both_clocks_agree(system, model, lengths):
    walked, jumped = (replay(system, lengths, model, jump) for jump in (False, True))
    for a, b in zip(walked.requests, jumped.requests, strict=True):
        assert [getattr(a, f.name) for f in fields(a)] == [getattr(b, f.name) for f in fields(b)]
    assert walked.resumed_gaps_ps == jumped.resumed_gaps_ps
    rows = jumped.steps.to_frame()
    pd.testing.assert_frame_equal(folded(walked.steps.to_frame(), rows), rows, check_names=False)


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_request_ends_or_is_refused(system):
    result = replay(system, HEAVY, SERIAL, jump=True)
    for request in result.requests:
        too_long = request.final_tokens > MAX_TOKENS
        assert request.state is (RequestState.REFUSED if too_long else RequestState.FINISHED)
        if not too_long:
            assert request.generated >= request.output_tokens
            assert request.arrival_ps <= request.scheduled_ps < request.first_token_ps <= request.finish_ps


def test_sliding_windows_walk():
    layout = sliding_layout(1, 1, window=16, num_kv_heads=1, head_size=8)
    lengths = [(10, 30, 10_000)] * 8
    walked, jumped = (replay("orca_oracle, orca", lengths, SERIAL, jump, layout) for jump in (False, True))
    pd.testing.assert_frame_equal(walked.steps.to_frame(), jumped.steps.to_frame())
