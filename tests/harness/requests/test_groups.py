"""How schedulers treat the sequences of one request: all of them, or none. Batches small enough to follow by hand."""

import pytest
from by_hand import BLOCK_BYTES, LAYOUT, make, paged

from kvarena.allocators.actions import CopyBlock, SwapIn, SwapOut
from kvarena.allocators.reservation.orca import OrcaConfig, OrcaPolicy
from kvarena.errors import UserError
from kvarena.harness.engine.engine import Engine
from kvarena.harness.modelled.modelled_executor import ModelledExecutor
from kvarena.harness.modelled.step_model import StepModel
from kvarena.harness.requests.decoding import GREEDY, DecodingConfig
from kvarena.harness.requests.group import Group
from kvarena.harness.requests.prefix import Prefix
from kvarena.harness.requests.request import Request, RequestState
from kvarena.harness.scheduler.gangs import catch_up


def gangs_of(*shapes, prefix=None):
    """Gangs of (prompt, output, sequences), or with 'beam' after it; arrivals one apart."""
    gangs, seq_id = [], 0
    for at, (prompt, output, n, *beam) in enumerate(shapes):
        decoding = DecodingConfig("beam" if beam else "parallel", n) if n > 1 else GREEDY
        gang = [Request(seq_id + i, prompt, output, arrival_ps=at, decoding=decoding, prefix=prefix) for i in range(n)]
        if n > 1:
            Group(gang)
        gangs.append(gang)
        seq_id += n
    return gangs


def submit(scheduler, *shapes, **options):
    gangs = gangs_of(*shapes, **options)
    for gang in gangs:
        scheduler.submit(gang[0])
    return gangs


def step(scheduler, now_ps=0):
    plan = scheduler.schedule(now_ps)
    scheduler.policy.check_integrity()
    scheduler.complete(plan, now_ps + 1)
    return plan


def prefilled(plan):
    return [(chunk.request.seq_id, chunk.start, chunk.tokens) for chunk in plan.prefills]


def ids(requests):
    return [request.seq_id for request in requests]


# ---- one prompt, several sequences ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["vllm", "orca", "chunked_prefill"])
def test_a_prompt_is_fed_once_and_yields_a_token_for_each(scheduler):
    scheduler = make(scheduler, paged(20))
    [gang] = submit(scheduler, (6, 3, 3))
    plan = step(scheduler)
    assert (prefilled(plan), plan.num_tokens) == ([(0, 0, 6)], 6)
    assert [(r.generated, r.computed, r.first_token_ps) for r in gang] == [(1, 6, 1)] * 3
    plan = step(scheduler)
    assert ids(plan.decodes) == [0, 1, 2]
    assert sum(isinstance(a, CopyBlock) for a in plan.actions) == 2, "the last writer keeps the shared block"
    step(scheduler)
    assert {r.state for r in gang} == {RequestState.FINISHED}
    assert scheduler.policy.free_units == 20
    assert scheduler.groups == []


def test_the_budget_counts_a_prompt_once_and_the_batch_every_sequence():
    scheduler = make("vllm", paged(40), token_budget=12, max_seqs=6)
    submit(scheduler, (7, 4, 4), (5, 4, 2), (1, 4, 1))
    assert prefilled(step(scheduler)) == [(0, 0, 7), (4, 0, 5)], "12 tokens; and 6 sequences are a full batch"


def test_a_group_waits_for_room_in_the_batch_for_all_of_it():
    scheduler = make("vllm", paged(40), max_seqs=4)
    submit(scheduler, (4, 3, 3), (4, 3, 2))
    assert prefilled(step(scheduler)) == [(0, 0, 4)]
    assert prefilled(step(scheduler)) == []


def test_orca_reserves_for_each_or_admits_none():
    """16 blocks: chunks of 4 blocks for each of 3 leave one, and a group of two wants two."""
    policy = OrcaPolicy(OrcaConfig(block_size=4, estimate="oracle"), LAYOUT, 16 * BLOCK_BYTES, max_tokens=64)
    scheduler = make("orca", policy)
    submit(scheduler, (10, 6, 3), (10, 6, 2), (10, 6, 1))
    assert prefilled(step(scheduler)) == [(0, 0, 10)], "and the third stands behind the second"
    assert policy.usage(scheduler.head).live == 3 * 10 * LAYOUT.token_bytes, "each has its own prompt"


def test_fastertransformer_batches_equal_numbers_of_sequences():
    from kvarena.allocators.reservation.fastertransformer import FasterTransformerConfig, FasterTransformerPolicy

    policy = FasterTransformerPolicy(
        FasterTransformerConfig(batch_size=9), LAYOUT, 2000 * LAYOUT.token_bytes, max_tokens=64
    )
    scheduler = make("fastertransformer", policy)
    submit(scheduler, (4, 3, 2), (6, 3, 2), (6, 3, 3), (6, 3, 2))
    plan = step(scheduler)
    assert prefilled(plan) == [(0, 0, 4), (2, 0, 6)]
    assert plan.padding == 2, "a prompt is padded once"


# ---- refused as a whole --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "limits", "refusal"),
    [
        ((4, 4, 5), {"max_seqs": 4}, "5 sequences exceed a batch of 4"),
        ((40, 30, 2), {}, "exceed the context of 64"),
        ((20, 25, 4), {}, "4 x 45 tokens can never fit paged's pool"),
    ],
)
def test_a_group_is_refused_as_a_whole(shape, limits, refusal):
    scheduler = make("vllm", paged(30), **limits)
    [gang, other] = submit(scheduler, shape, (4, 2, 1))
    assert all(refusal in r.refusal and r.state is RequestState.REFUSED for r in gang)
    assert prefilled(step(scheduler)) == [(other[0].seq_id, 0, 4)], "nobody waits for it"


# ---- preempted as a whole ------------------------------------------------------------------------------------------


def test_a_group_needs_a_free_block_for_each_of_its_sequences():
    """vLLM's rule: one for each, even if all have room in their last block."""
    scheduler = make("vllm", paged(6, swap_blocks=20))
    _, second = submit(scheduler, (5, 3, 1), (5, 3, 2))
    step(scheduler)
    assert scheduler.policy.free_units == 2, "two blocks each, the second's shared"
    plan = step(scheduler)
    assert (ids(plan.decodes), plan.swapped_out) == ([0, 1, 2], [])
    assert scheduler.policy.free_units == 1
    plan = step(scheduler)
    assert (ids(plan.decodes), plan.swapped_out) == ([0], second), "1 of 2 is not enough"
    assert {r.state for r in second} == {RequestState.SWAPPED}
    assert sum(isinstance(a, SwapOut) for a in plan.actions) == 3, "the shared block once, and a last one each"


def test_a_group_is_swapped_and_comes_back_sharing():
    scheduler = make("vllm", paged(6, swap_blocks=20))
    first, second = submit(scheduler, (5, 3, 1), (5, 3, 2))
    for _ in range(3):
        step(scheduler)
    assert first[0].state is RequestState.FINISHED
    plan = step(scheduler)
    assert plan.swapped_in == second
    assert ids(plan.decodes) == [1, 2]
    assert sum(isinstance(a, SwapIn) for a in plan.actions) == 3
    assert scheduler.resumed_gaps_ps == [1, 1]
    assert scheduler.policy.sharing.shared_bytes == 0, "and left"
    assert {r.state for r in second} == {RequestState.FINISHED}


def run_out(scheduler):
    """Step until the second gang has been preempted."""
    for now in range(60):
        plan = step(scheduler, now)
        if plan.preempted or plan.swapped_out:
            return plan
    raise AssertionError("nobody was preempted")


@pytest.mark.parametrize(
    ("preemption", "swap_blocks", "n", "swaps"),
    [
        ("auto", 40, 3, True),
        ("auto", 40, 1, False),
        ("auto", 0, 3, False),
        ("auto", 2, 3, False),
        ("recompute", 40, 3, False),
        ("swap", 40, 1, True),
    ],
)
def test_one_sequence_is_recomputed_and_several_are_swapped_where_there_is_room(preemption, swap_blocks, n, swaps):
    scheduler = make("vllm", paged(22 if n > 1 else 16, swap_blocks=swap_blocks), preemption=preemption)
    _, second = submit(scheduler, (8, 30, 1), (9, 20 if n > 1 else 30, n))
    plan = run_out(scheduler)
    assert (plan.swapped_out if swaps else plan.preempted) == second
    assert len(second) == n


def test_a_recomputed_group_feeds_its_prompt_once_then_each_members_own_tokens():
    scheduler = make("vllm", paged(22))
    first, second = submit(scheduler, (8, 19, 1), (9, 20, 3))
    plan = run_out(scheduler)
    own = second[0].generated
    assert plan.preempted == second
    assert scheduler.policy.check_integrity() is None
    while not (plan := step(scheduler, 100)).prefills:
        assert plan.decodes == first
    assert prefilled(plan) == [(1, 0, 9)], "its prompt"
    assert [r.computed for r in second] == [9, 9, 9]
    plan = step(scheduler, 200)
    assert prefilled(plan) == [(r.seq_id, 9, own) for r in second], "and what each had said"
    assert [r.generated for r in second] == [own + 1] * 3
    plan = step(scheduler, 300)
    assert ids(plan.decodes) == ids(second)
    assert len(scheduler.resumed_gaps_ps) == 3


def test_catching_up_waits_for_the_last_member_where_the_budget_cuts_it():
    [gang] = gangs_of((9, 20, 3))
    for member in gang:
        member.computed, member.generated, member.paused_ps = 9, 6, 0
    fed = []
    for _ in range(9):
        chunks = catch_up(gang[0].group, budget=7)
        fed.append([(c.request.seq_id, c.start, c.tokens, c.is_last) for c in chunks])
        for chunk in chunks:
            chunk.request.computed += chunk.tokens
        if chunks[-1].is_last:
            break
    assert fed == [
        [(0, 9, 5, False), (1, 9, 2, False)],
        [(1, 11, 3, False), (2, 9, 4, False)],
        [(0, 14, 1, True), (1, 14, 1, True), (2, 13, 2, True)],
    ]


def test_chunked_prefill_recomputes_a_group_within_its_budget():
    scheduler = make("chunked_prefill", paged(22), token_budget=8, max_seqs=8)
    _, second = submit(scheduler, (8, 19, 1), (9, 20, 3))
    run_out(scheduler)
    own = second[0].generated
    assert own > 2
    prompts = members = 0
    for now in range(200):
        plan = step(scheduler, 100 + now)
        assert plan.num_tokens <= 8
        prompts += sum(c.tokens for c in plan.prefills if c.request is second[0] and c.start < 9)
        members += sum(c.tokens for c in plan.prefills if c.start >= 9)
        if second[0].finish_ps:
            break
    assert (prompts, members) == (9, 3 * own), "the prompt once, and each member's own tokens"
    assert {r.finish_ps for r in second} == {101 + now}


# ---- beams ---------------------------------------------------------------------------------------------------------


def test_dead_beams_are_freed_and_survivors_forked():
    """Blocks of 4, a prompt of 4: beams of one token each; all descend from beam 2 then."""
    scheduler = make("vllm", paged(20))
    [gang] = submit(scheduler, (4, 6, 3, "beam"))
    step(scheduler)
    assert not gang[0].group.needs_ranking, "three first tokens of one prompt: nobody can die"
    step(scheduler)
    assert gang[0].group.needs_ranking
    before = {r.seq_id: list(scheduler.policy.block_table(r.seq_id)) for r in gang}
    scheduler.rank(lambda group: (2, 2, 2))
    tables = [scheduler.policy.block_table(r.seq_id) for r in gang]
    assert tables == [before[2]] * 3, "everyone holds what beam 2 held"
    assert scheduler.policy.free_units == 18, "what beams 0 and 1 alone held is free"
    assert not gang[0].group.needs_ranking, "once for each token"
    plan = step(scheduler)
    assert sum(isinstance(a, CopyBlock) for a in plan.actions) == 2


def test_a_modelled_clock_ranks_by_its_survival_model():
    def shared_by(survival):
        decoding = DecodingConfig("beam", 4, survival=survival)
        gang = [Request(i, 5, 40, decoding=decoding) for i in range(4)]
        Group(gang)
        done = Engine(make("vllm", paged(80)), ModelledExecutor(StepModel(False, 100, 0, 0, 0, 0))).run(gang)
        return done.steps.to_frame().shared_bytes.sum()

    assert shared_by("one") > shared_by("neutral") > shared_by("all") > 0


# ---- prefixes ------------------------------------------------------------------------------------------------------


def test_what_a_prefix_holds_is_not_fed_again():
    scheduler = make("vllm", paged(20))
    prefix = Prefix(-1, 6)
    scheduler.keep_prefix(prefix)
    scheduler.policy.drain()
    assert scheduler.policy.free_units == 18
    _, group = submit(scheduler, (9, 3, 1), (10, 3, 2), prefix=prefix)
    plan = step(scheduler)
    assert prefilled(plan) == [(0, 6, 3), (1, 6, 4)]
    assert all(isinstance(a, CopyBlock) for a in plan.actions)
    assert len(plan.actions) == 2, "the prefix's last block is not full: a copy for each request"
    assert [r.computed for r in group] == [10, 10]
    for _ in range(2):
        step(scheduler)
    assert scheduler.policy.free_units == 18, "the prefix stays"


@pytest.mark.parametrize("name", ["vllm", "chunked_prefill", "orca"])
def test_a_prefix_shortens_what_counts_against_the_budget(name):
    scheduler = make(name, paged(40), token_budget=8, max_seqs=8)
    prefix = Prefix(-1, 20)
    scheduler.keep_prefix(prefix)
    submit(scheduler, (23, 2, 1), (24, 2, 1), prefix=prefix)
    assert prefilled(step(scheduler)) == [(0, 20, 3), (1, 20, 4)]


def test_a_prefix_that_nobody_keeps_is_fed_with_every_prompt():
    scheduler = make("vllm", paged(20))
    submit(scheduler, (9, 3, 1), prefix=Prefix(-1, 6))
    assert prefilled(step(scheduler)) == [(0, 0, 9)]


def test_what_prefixes_refuse():
    with pytest.raises(UserError, match="exceeds the context of 64"):
        make("vllm", paged(40)).keep_prefix(Prefix(-1, 65))
    with pytest.raises(UserError, match="does not fit paged's pool"):
        make("vllm", paged(4)).keep_prefix(Prefix(-1, 20))
    with pytest.raises(UserError, match="a prefix of 0 tokens"):
        Prefix(-1, 0)
    with pytest.raises(UserError, match=r"prompt of 6 .*prefix of 6"):
        Prefix(-1, 6).check(6)
