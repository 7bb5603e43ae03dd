"""The rules of each scheduling policy, on batches small enough to follow by hand."""

from dataclasses import replace

import pytest
from by_hand import LAYOUT, make, paged

from kvarena.allocators.policy import SwapIn, SwapOut
from kvarena.allocators.registry import config_class as allocator_config
from kvarena.allocators.registry import make_policy
from kvarena.errors import UserError
from kvarena.harness.config import load, names, typed
from kvarena.harness.requests.request import Request, RequestState
from kvarena.harness.scheduler.registry import SCHEDULERS, config_class, make_scheduler


def submit(scheduler, *lengths):
    requests = [Request(i, prompt, output, arrival_ps=i) for i, (prompt, output) in enumerate(lengths)]
    for request in requests:
        scheduler.submit(request)
    return requests


def step(scheduler, now_ps=0):
    plan = scheduler.schedule(now_ps)
    scheduler.complete(plan, now_ps + 1)
    return plan


def prefilled(plan):
    return [(chunk.request.seq_id, chunk.start, chunk.tokens) for chunk in plan.prefills]


def decoded(plan):
    return [request.seq_id for request in plan.decodes]


# ---- vLLM's scheduler of 2023 (PagedAttention section 4.5) ---------------------------------------------------------


def test_prefills_and_decodes_share_an_iteration():
    scheduler = make("vllm", paged(20))
    submit(scheduler, (5, 3))
    assert prefilled(step(scheduler)) == [(0, 0, 5)]
    scheduler.submit(Request(1, 6, 2, arrival_ps=1))
    plan = step(scheduler)
    assert (decoded(plan), prefilled(plan), plan.num_tokens) == ([0], [(1, 0, 6)], 7)


def test_nobody_overtakes_the_head_of_the_line():
    scheduler = make("vllm", paged(10))
    submit(scheduler, (16, 2), (28, 2), (4, 2))
    assert prefilled(step(scheduler)) == [(0, 0, 16)], "the second needs 7 of 6 blocks; the third would fit"


def test_the_budget_counts_decodes_and_whole_prompts():
    scheduler = make("vllm", paged(40), token_budget=12, max_seqs=12)
    submit(scheduler, (6, 4), (6, 4), (4, 4), (7, 4))
    assert prefilled(step(scheduler)) == [(0, 0, 6), (1, 0, 6)]
    plan = step(scheduler)
    assert (decoded(plan), prefilled(plan)) == ([0, 1], [(2, 0, 4)]), "2 + 4 + 7 is one too many"


def test_the_batch_is_capped():
    scheduler = make("vllm", paged(40), max_seqs=2)
    submit(scheduler, (4, 3), (4, 3), (4, 3))
    assert len(step(scheduler).prefills) == 2
    assert step(scheduler).prefills == []


def test_admission_leaves_the_watermark_and_growth_may_use_it():
    scheduler = make("vllm", paged(10, watermark=0.2))
    submit(scheduler, (12, 8), (12, 8), (12, 2))
    assert [chunk[0] for chunk in prefilled(step(scheduler))] == [0, 1], "3 more of 4 blocks would touch the last 2"
    for _ in range(5):
        plan = step(scheduler)
        assert (decoded(plan), plan.preempted, prefilled(plan)) == ([0, 1], [], [])
    assert scheduler.policy.free_units == 0


def test_an_append_wants_a_free_block_even_where_the_last_has_room():
    scheduler = make("vllm", paged(4))
    _, second = submit(scheduler, (6, 4), (6, 4))
    step(scheduler)
    assert scheduler.policy.free_units == 0
    plan = step(scheduler)
    assert (decoded(plan), plan.preempted) == ([0], [second]), "both last blocks have room for a token"
    assert (second.state, second.computed, second.generated) == (RequestState.WAITING, 0, 1)


def test_the_latest_arrival_is_preempted_and_nobody_is_admitted_then():
    scheduler = make("vllm", paged(5))
    _, _, third = submit(scheduler, (8, 9), (4, 8), (4, 8))
    assert len(step(scheduler).prefills) == 3
    plan = step(scheduler)  # each needs a block; one is free, and two must come from the victims
    assert decoded(plan) == [0, 1]
    assert plan.preempted == [third]
    assert prefilled(plan) == []
    assert list(scheduler.waiting) == [third]


def test_a_victim_is_prefilled_with_its_output_and_keeps_its_count():
    scheduler = make("vllm", paged(4))
    _, victim = submit(scheduler, (6, 3), (6, 4))
    step(scheduler, 0)
    assert step(scheduler, 1).preempted == [victim]
    assert prefilled(step(scheduler, 2)) == [(1, 0, 7)], "6 of the prompt and 1 generated"
    assert (victim.generated, victim.computed, victim.num_preemptions) == (2, 7, 1)
    assert victim.is_decoding
    assert scheduler.resumed_gaps_ps == [2], "its tokens came at 1 and at 3"
    assert victim.first_token_ps == 1
    assert victim.scheduled_ps == 0


def test_swapped_requests_come_back_before_anyone_waiting():
    scheduler = make("vllm", paged(6, swap_blocks=8), preemption="swap")
    _, _, third = submit(scheduler, (6, 3), (10, 4), (2, 2))
    assert prefilled(step(scheduler, 0)) == [(0, 0, 6), (1, 0, 10), (2, 0, 2)]
    plan = step(scheduler, 1)
    assert decoded(plan) == [0, 1]
    assert (plan.swapped_out, plan.preempted) == ([third], [])
    assert plan.actions == [SwapOut(plan.actions[0].source, plan.actions[0].target)]
    scheduler.submit(Request(3, 2, 2, arrival_ps=3))
    assert prefilled(step(scheduler, 2)) == [], "someone is swapped out"
    plan = step(scheduler, 3)
    assert (plan.swapped_in, decoded(plan)) == ([third], [1, 2])
    assert isinstance(plan.actions[0], SwapIn)
    assert prefilled(plan) == [(3, 0, 2)], "in the same step, now that nobody is swapped out"
    assert third.state is RequestState.FINISHED
    assert scheduler.resumed_gaps_ps == [3], "its tokens came at 1 and at 4"


def test_whoever_returns_from_the_cpu_pool_leaves_the_watermark():
    scheduler = make("vllm", paged(16, watermark=0.25, swap_blocks=40), preemption="swap")
    submit(scheduler, *[(6, 30), (3, 12), (9, 25), (5, 40), (2, 9)] * 3)
    left = []
    while scheduler.has_work:
        if step(scheduler).swapped_in:
            left.append(scheduler.policy.free_units)
    assert len(left) > 3
    assert min(left) == 4, "as many as an admission leaves, and no more"


def test_a_full_cpu_pool_means_recomputation():
    scheduler = make("vllm", paged(4, swap_blocks=1), preemption="swap")
    _, second = submit(scheduler, (6, 4), (6, 4))
    step(scheduler)
    plan = step(scheduler)
    assert (plan.swapped_out, plan.preempted) == ([], [second])


def test_swapping_without_a_cpu_pool_is_refused():
    with pytest.raises(UserError, match="paged has no CPU pool"):
        make("vllm", paged(4), preemption="swap")
    with pytest.raises(UserError, match=r"preemption=drop.*auto, recompute, swap"):
        make("vllm", paged(4), preemption="drop")


# ---- refusal at arrival --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "lengths", "limit"),
    [
        ("vllm", {}, (60, 5), "exceed the context of 64"),
        ("vllm", {}, (30, 12), "can never fit paged's pool"),
        ("vllm", {"token_budget": 16, "max_seqs": 8}, (12, 6), "17 tokens to prefill in one step exceed the"),
        ("orca", {"token_budget": 16, "max_seqs": 8}, (17, 1), "17 tokens to prefill"),
        ("chunked_prefill", {}, (30, 12), "can never fit paged's pool"),
        ("fastertransformer", {}, (60, 5), "exceed the context of 64"),
    ],
)  # fmt: skip
def test_a_request_that_could_never_run_is_refused_and_nobody_waits_for_it(name, options, lengths, limit):
    scheduler = make(name, paged(10), **options)
    hopeless, fine = submit(scheduler, lengths, (4, 2))
    assert hopeless.state is RequestState.REFUSED
    assert hopeless.refusal.startswith("request 0: ")
    assert limit in hopeless.refusal
    assert list(scheduler.waiting) == [fine]


def test_a_prompt_that_fits_the_budget_may_run_where_nobody_is_recomputed():
    scheduler = make("orca", paged(10), token_budget=16, max_seqs=8)
    [request] = submit(scheduler, (12, 6))
    assert request.state is RequestState.WAITING


# ---- Orca, FasterTransformer ---------------------------------------------------------------------------------------


def reserving(name, **options):
    config = typed(allocator_config(name), load("allocator", name), "allocator")
    return make_policy(replace(config, **options), LAYOUT, 200 * LAYOUT.token_bytes, 64)


def test_orca_admits_up_to_its_memory_and_preempts_nobody():
    scheduler = make("orca", reserving("orca_max", block_size=4))
    submit(scheduler, *[(4, 3)] * 5)
    assert len(step(scheduler).prefills) == 3, "rows of 64 of 200 tokens"
    for _ in range(2):
        assert decoded(step(scheduler)) == [0, 1, 2]
    assert [chunk[0] for chunk in prefilled(step(scheduler))] == [3, 4]


def test_orca_over_memory_that_runs_out_is_refused():
    scheduler = make("orca", paged(5))
    submit(scheduler, (8, 8), (8, 8))
    with pytest.raises(UserError, match=r"scheduler=orca .*paged"):
        [step(scheduler) for _ in range(3)]


def test_a_padded_batch_ends_as_one():
    scheduler = make("fastertransformer", reserving("fastertransformer", batch_size=2))
    requests = submit(scheduler, (5, 2), (9, 4), (3, 3))
    plan = step(scheduler)
    assert prefilled(plan) == [(0, 0, 5), (1, 0, 9)]
    assert (plan.padding, plan.num_tokens) == (4, 18), "two rows of 9"
    for now_ps in (1, 2):
        assert decoded(step(scheduler, now_ps)) == [0, 1]
        assert requests[0].finish_ps is None, "done, but its row runs on"
    step(scheduler, 3)
    assert requests[0].finish_ps == requests[1].finish_ps == 4
    assert prefilled(step(scheduler, 4)) == [(2, 0, 3)]


# ---- chunked prefill -----------------------------------------------------------------------------------------------


def test_prompts_are_cut_to_what_decodes_leave_of_the_budget():
    scheduler = make("chunked_prefill", paged(40), token_budget=8, max_seqs=8)
    submit(scheduler, (6, 9), (15, 2))
    assert prefilled(step(scheduler)) == [(0, 0, 6), (1, 0, 2)]
    plan = step(scheduler)
    assert (decoded(plan), prefilled(plan)) == ([0], [(1, 2, 7)])
    plan = step(scheduler)
    assert (decoded(plan), prefilled(plan)) == ([0], [(1, 9, 6)])
    assert decoded(step(scheduler)) == [0, 1]


def test_chunks_yield_a_token_only_when_the_prompt_is_done():
    scheduler = make("chunked_prefill", paged(40), token_budget=4, max_seqs=4)
    [request] = submit(scheduler, (10, 2))
    generated = []
    for now_ps in range(3):
        step(scheduler, now_ps)
        generated.append(request.generated)
    assert generated == [0, 0, 1]
    assert request.first_token_ps == 3


def test_v1_recomputes_the_latest_and_puts_it_first_in_line():
    scheduler = make("vllm_v1", paged(4), token_budget=64, max_seqs=64)
    _, second, third = submit(scheduler, (6, 5), (7, 5), (4, 2))
    assert len(step(scheduler).prefills) == 2
    assert decoded(step(scheduler)) == [0, 1], "no spare block is asked for"
    plan = step(scheduler)
    assert (decoded(plan), plan.preempted, prefilled(plan)) == ([0], [second], [])
    assert list(scheduler.waiting) == [second, third]


def test_a_chunk_that_ends_within_the_output_yields_no_token():
    scheduler = make("chunked_prefill", paged(8), token_budget=4, max_seqs=4)
    requests = submit(scheduler, (3, 20), (3, 20))
    within = 0
    for now_ps in range(200):
        plan = scheduler.schedule(now_ps)
        before = [(chunk.request.known_tokens, chunk.request.generated) for chunk in plan.prefills]
        scheduler.complete(plan, now_ps + 1)
        for (request, start, tokens), (known, generated) in zip(plan.prefills, before, strict=True):
            assert request.generated - generated == (start + tokens == known)
            within += request.prompt_tokens < start + tokens < known
    assert within > 0, "the latest was recomputed, and its output cut"
    assert [r.generated for r in requests] == [20, 20]


# ---- configuration -------------------------------------------------------------------------------------------------


def test_every_scheduler_has_its_file_and_every_file_its_schema():
    assert tuple(names("scheduler")) == SCHEDULERS
    for name in SCHEDULERS:
        assert typed(config_class(name), load("scheduler", name), "scheduler").name == name


def test_senseless_limits_and_names_are_refused():
    with pytest.raises(UserError, match=r"scheduler.max_seqs=0"):
        make("vllm", paged(4), max_seqs=0)
    with pytest.raises(UserError, match=r"scheduler.token_budget=8.*scheduler.max_seqs=16"):
        make("orca", paged(4), token_budget=8, max_seqs=16)
    with pytest.raises(UserError, match=r"scheduler=sjf.* chunked_prefill, "):
        config_class("sjf")


def test_the_budget_follows_the_context():
    assert make("vllm", paged(4)).token_budget == 2560
    assert make_scheduler(config_class("vllm")(), paged(4), max_tokens=8192).token_budget == 8192
