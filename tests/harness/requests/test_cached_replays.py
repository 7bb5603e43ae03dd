"""A prefix cache in the serving loop: the same tokens with and without it, the same decisions under both clocks, and as
many hits as counted by hand.
"""

from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from two_clocks import Keeper, Scripted, noted_decisions

from kvarena.allocators.kv_layout import attention_layout
from kvarena.allocators.registry import config_class, make_policy
from kvarena.allocators.stores import make_store
from kvarena.experiments.ours.prefix_hits import count_hits
from kvarena.harness.config import load, typed
from kvarena.harness.decoding.decoder import Decoder
from kvarena.harness.engine.engine import Engine
from kvarena.harness.model import ModelConfig
from kvarena.harness.model.build import build_model
from kvarena.harness.modelled.modelled_executor import ActionPrices, ModelledExecutor
from kvarena.harness.modelled.step_model import StepModel
from kvarena.harness.record.metrics import reused_share
from kvarena.harness.requests.decoding import GREEDY, DecodingConfig
from kvarena.harness.requests.group import Group
from kvarena.harness.requests.prefix import Prefix
from kvarena.harness.requests.prompt import block_spans, conversation_span
from kvarena.harness.requests.prompt_names import PromptNames
from kvarena.harness.requests.request import Request, RequestState
from kvarena.harness.requests.request_list import make_requests
from kvarena.harness.requests.request_log import request_frame
from kvarena.harness.requests.workload import Workload
from kvarena.harness.scheduler.registry import config_class as scheduler_class
from kvarena.harness.scheduler.registry import make_scheduler
from kvarena.kernels.registry import get_kernel

MAX_TOKENS = 96
BLOCK = 8  # tokens of a block of the traces
PAIR, BEAM = DecodingConfig("parallel", 2, seed=7), DecodingConfig("beam", 3)
CHUNKS = {"token_budget": 16, "max_seqs": 16}
ROWS = {"page_group": "64KB", "max_rows": 10, "tensor_slicing": True}  # a page-group holds 8 tokens


def spans_of_ids(ids, prompt):
    return block_spans(np.array(ids), BLOCK, prompt)


def requests_of(load, gap_ps):
    """A request for each (ids of blocks, prompt, output, decoding)."""
    requests = []
    for i, (ids, prompt, output, decoding) in enumerate(load):
        first, spans = len(requests), spans_of_ids(ids, prompt)
        gang = [
            Request(first + j, prompt, output, arrival_ps=i * gap_ps, decoding=decoding, spans=spans)
            for j in range(decoding.n)
        ]
        if len(gang) > 1:
            Group(gang)
        requests += gang
    return requests


def serve(system, layout, requests, executor_of, *, jump=False, cache=True, prefixes=()):
    """One replay, its books checked after every step. Returns it, its decisions and the executor."""
    allocator, options, name, limits, tokens = system
    config = replace(typed(config_class(allocator), load("allocator", allocator), "allocator"), **options)
    if cache:
        config = replace(config, prefix_cache=True)
    policy = make_policy(config, layout, tokens * layout.token_bytes, MAX_TOKENS)
    scheduler = make_scheduler(scheduler_class(name)(name=name, **limits), policy, MAX_TOKENS)
    decisions = noted_decisions(scheduler)
    executor = executor_of(policy)
    done = Engine(scheduler, executor, jump=jump, prefixes=prefixes).run(requests)
    if not prefixes:
        assert policy.usage().live == 0, "a finished replay leaks nothing"
    return done, decisions, executor


# ---- the measured clock ----------------------------------------------------------------------------------------

LOAD = [  # ids of the prompt's blocks of 8 tokens, prompt, output, decoding
    ([1, 2, 3], 23, 14, GREEDY), ([1, 2, 4], 22, 20, GREEDY), ([1, 2, 3, 5], 31, 9, GREEDY), ([7], 3, 25, GREEDY),
    ([1, 2], 16, 11, GREEDY), ([1, 2, 3, 5], 31, 12, GREEDY), ([8, 9], 12, 18, GREEDY), ([1, 2, 4, 6], 26, 12, PAIR),
    ([8, 9, 10, 11, 12], 40, 5, GREEDY), ([8, 9, 10], 24, 23, BEAM), ([1, 2, 3, 5, 6], 33, 11, PAIR),
    ([1, 2], 10, 8, GREEDY), ([8, 9, 10, 11, 13], 36, 30, GREEDY), ([1, 2, 4, 6, 14], 40, 9, BEAM),
]  # fmt: skip
TINY = typed(ModelConfig, load("model", "tiny-llama"), "model")
WIDE = replace(TINY, hidden_size=1024, num_heads=16, num_kv_heads=16, head_size=64)
SWAP_BYTES = 600 * WIDE.kv_layout().token_bytes
MEASURED = {
    "recomputing": ("paged", {"block_size": 4}, "vllm", {"preemption": "recompute"}, 150),
    "swapping": ("paged", {"block_size": 4, "swap_bytes": SWAP_BYTES}, "vllm", {"preemption": "swap"}, 150),
    "in chunks": ("paged", {"block_size": 4, "watermark": 0}, "chunked_prefill", CHUNKS, 130),
    "mapping rows": ("vattention", ROWS, "vllm", {}, 160),
    "mapping in chunks": ("vattention", ROWS, "chunked_prefill", CHUNKS, 160),
    "mapping at once": ("vattention", ROWS | {"overlap": False, "max_rows": 5}, "vllm", {"max_seqs": 5}, 120),
}


@pytest.fixture(scope="module")
def model():
    return build_model(WIDE, "cpu")


def measured(system, model, **options):
    def executor_of(policy):
        store = make_store(policy, WIDE.num_layers, WIDE.num_kv_heads, WIDE.head_size, WIDE.dtype)
        return Keeper(model, store, get_kernel("numba"))

    done, decisions, executor = serve(system, WIDE.kv_layout(), requests_of(LOAD, 0), executor_of, **options)
    executor.store.close()
    return done, decisions, executor


def test_the_same_tokens_with_and_without_the_cache_under_both_clocks(model):
    """Through eviction from the cache and preemption; and the same step times give the same decisions."""
    _, _, plain = measured(("static", {}, "vllm", {}, 40 * MAX_TOKENS), model, cache=False)
    for name, system in MEASURED.items():
        done, decisions, executor = measured(system, model)
        assert executor.finished == plain.finished, name
        rows = done.steps.to_frame()
        assert rows.reused_tokens.sum() > 60, name
        assert sum(len(d[1]) + len(d[2]) for d in decisions) > 0, f"{name}: nobody is preempted"
        script = rows.duration_ps.tolist(), executor.lived_on
        again, same, _ = serve(system, WIDE.kv_layout(), requests_of(LOAD, 0), lambda policy, s=script: Scripted(*s))
        assert same == decisions, name
        assert [r.finish_ps for r in again.requests] == [r.finish_ps for r in done.requests]


CHAT = [(1, 20, 9), (2, 9, 14), (1, 6, 12), (3, 30, 5), (1, 4, 10), (2, 12, 8), (3, 3, 20), (1, 5, 12), (2, 7, 20)]


def turns_of(chat, gap_ps=0):
    """A request for each (conversation, question, answer); its prompt is all that was said before, and the question."""
    said, requests = {}, []
    for i, (conversation, question, answer) in enumerate(chat):
        prompt = said.get(conversation, 0) + question
        said[conversation] = prompt + answer
        spans = conversation_span(conversation, prompt)
        requests.append(Request(i, prompt, answer, arrival_ps=i * gap_ps, spans=spans))
    return requests


class Listener(Decoder):
    """Notes what the model would have said where the trace says something else."""

    def __init__(self, *args):
        super().__init__(*args)
        self.likeliest = {}

    def _answer(self, request, position, likeliest):
        self.likeliest.setdefault(request.seq_id, []).append(likeliest)
        return super()._answer(request, position, likeliest)


@pytest.mark.parametrize("allocator", ["paged", "vattention"])
def test_a_turn_finds_what_was_answered_to_the_one_before(model, allocator):
    """With the cache the model is of the same mind: so what is found is what was written. And both clocks agree."""
    options = {"block_size": 4} if allocator == "paged" else ROWS
    system = (allocator, options, "vllm", {"max_seqs": 1}, 400)  # one after the other

    def listening(policy):
        store = make_store(policy, WIDE.num_layers, WIDE.num_kv_heads, WIDE.head_size, WIDE.dtype)
        executor = Keeper(model, store, get_kernel("numba"))
        executor._decoder = Listener(WIDE.vocab_size, 0)
        executor.tokens = executor._decoder.tokens
        return executor

    done, decisions, cached = serve(system, WIDE.kv_layout(), turns_of(CHAT), listening)
    _, _, plain = serve(system, WIDE.kv_layout(), turns_of(CHAT), listening, cache=False)
    assert cached._decoder.likeliest == plain._decoder.likeliest
    assert cached.finished == plain.finished
    assert cached.finished[0] == Decoder(WIDE.vocab_size, 0).known(turns_of(CHAT)[2])[20:29], "as turn 2 repeats it"
    unit, written, expected = 4 if allocator == "paged" else 8, {}, []
    for (conversation, _, _), request in zip(CHAT, done.requests, strict=True):
        expected.append(min(written.get(conversation, 0), request.prompt_tokens - 1) // unit * unit)
        written[conversation] = request.final_tokens - 1  # the last token is never fed
    assert [request.reused_tokens for request in done.requests] == expected
    assert sum(expected) > 100
    script = done.steps.to_frame().duration_ps.tolist()
    _, same, _ = serve(system, WIDE.kv_layout(), turns_of(CHAT), lambda _: Scripted(script))
    assert same == decisions
    cached.store.close()
    plain.store.close()


# ---- the modelled clock ----------------------------------------------------------------------------------------

LAYOUT = attention_layout(num_layers=2, num_kv_heads=64, head_size=128)  # a page-group of 64 KB holds 4 tokens
SWAP = {"block_size": 4, "swap_bytes": 150 * LAYOUT.token_bytes}
MODELLED = {
    "paged, vllm": ("paged", {"block_size": 4}, "vllm", {"max_seqs": 12}, 200),
    "paged, small budget": ("paged", {"block_size": 4}, "vllm", {"max_seqs": 12, "token_budget": 96}, 200),
    "paged, swap": ("paged", SWAP, "vllm", {"max_seqs": 12}, 200),
    "paged, chunks": ("paged", {"block_size": 4, "watermark": 0}, "chunked_prefill", CHUNKS, 200),
    "paged, whole prompts": ("paged", {"block_size": 4}, "sarathi", CHUNKS | {"whole_prompts": True}, 200),
    "vattention, vllm": ("vattention", {"page_group": "64KB", "max_rows": 12}, "vllm", {}, 200),
    "vattention, few rows": ("vattention", {"page_group": "64KB", "max_rows": 4}, "vllm", {"max_seqs": 4}, 200),
    "vattention, sync": ("vattention", {"page_group": "128KB", "max_rows": 12, "overlap": False}, "vllm", {}, 200),
    "vattention, chunks": ("vattention", {"page_group": "64KB", "max_rows": 16}, "chunked_prefill", CHUNKS, 200),
}
MODEL = StepModel(True, 23_000, 10, 20_000, 900, 31, 3, 50, 5)
PRICES = ActionPrices(77, 501, 499, (9001, 9001), (803, 803), (2, 2))
WAYS = [GREEDY, GREEDY, DecodingConfig("parallel", 3), DecodingConfig("beam", 2, survival="neutral")]


def family_ids(family, agree, blocks):
    """Prompts of one family agree in their first blocks."""
    return [100 * family + i + (50 if i >= agree else 0) for i in range(blocks)]


SHAPES = st.tuples(
    st.integers(0, 2), st.integers(0, 8), st.integers(1, 60), st.integers(1, 30), st.sampled_from(WAYS)
)  # family, blocks that agree, prompt, output, decoding
HEAVY = [(i % 3, 2 + i % 5, 5 + 13 * i % 55, 1 + 7 * i % 30, WAYS[i % 4]) for i in range(30)]


def load_of(shapes):
    return [
        (family_ids(f, agree, -(-prompt // BLOCK)), prompt, output, way) for f, agree, prompt, output, way in shapes
    ]


def modelled(system, shapes, gap_ps=40_000, **options):
    return modelled_requests(system, requests_of(load_of(shapes), gap_ps), **options)


def modelled_requests(system, requests, **options):
    return serve(MODELLED[system], LAYOUT, requests, lambda policy: ModelledExecutor(MODEL, PRICES), **options)[0]


@pytest.mark.parametrize("system", MODELLED)
@settings(max_examples=5, deadline=None)
@given(shapes=st.lists(SHAPES, min_size=1, max_size=14), gap_ps=st.sampled_from([0, 40_000, 900_000]))
@example(shapes=HEAVY, gap_ps=0)
@example(shapes=HEAVY, gap_ps=100_000)
def test_walking_and_jumping_agree_and_everyone_ends(system, shapes, gap_ps):
    agree(*(modelled(system, shapes, gap_ps, jump=jump) for jump in (False, True)))


@pytest.mark.parametrize("system", MODELLED)
@settings(max_examples=5, deadline=None)
@given(
    chat=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 20), st.integers(1, 30)), min_size=1, max_size=20),
    gap_ps=st.sampled_from([0, 200_000, 900_000]),
)
@example(chat=CHAT, gap_ps=300_000)
def test_walking_and_jumping_agree_on_chats(system, chat, gap_ps):
    """Turns that come before the one before has ended, too; those that outgrow the context are refused."""
    agree(*(modelled_requests(system, turns_of(chat, gap_ps), jump=jump) for jump in (False, True)))


def agree(walked, jumped):
    """Whether both clocks gave the same, request by request, and row by row."""
    for a, b in zip(walked.requests, jumped.requests, strict=True):
        assert all(getattr(a, f.name) == getattr(b, f.name) for f in fields(a) if f.name != "group")
    rows, steps = jumped.steps.to_frame(), walked.steps.to_frame()
    sums = steps.groupby(rows.index.repeat(rows.steps)).sum()
    # of each step; all others are sums over the steps of a row
    of_each = ["start_ps", "slope_ps", "requests", "decodes", "output_tokens", "waiting"]
    pd.testing.assert_frame_equal(sums.drop(columns=of_each), rows.drop(columns=of_each), check_names=False)
    for request in walked.requests:
        assert request.state is RequestState.REFUSED or request.generated == request.output_tokens


@pytest.mark.parametrize("tokens", [400, 3000], ids=["evicting", "roomy"])
@pytest.mark.parametrize("allocator", ["paged", "vattention"])
def test_the_clock_jumps_with_the_cache_too(allocator, tokens):
    """Steps that only decode are jumped over, also where blocks that could be found are taken. A kept row is given up
    in a step of its own.
    """
    options = {"block_size": 4} if allocator == "paged" else {"page_group": "64KB", "max_rows": 40}
    load = [(family_ids(i % 9, 3, 4), 30, 60, GREEDY) for i in range(30)]
    rows = {}
    for cache in (False, True):
        requests, system = requests_of(load, 3_000_000), (allocator, options, "vllm", {}, tokens)
        done = serve(system, LAYOUT, requests, lambda _: ModelledExecutor(MODEL, PRICES), jump=True, cache=cache)[0]
        rows[cache] = done.steps.to_frame()
    assert rows[True].reused_tokens.sum() > 0
    given_up = len(load) * 60 / 20 if (allocator, tokens) == ("vattention", 400) else 0
    assert len(rows[True]) <= 1.3 * len(rows[False]) + given_up < 0.2 * rows[True].steps.sum()


@pytest.mark.parametrize("system", MODELLED)
def test_what_is_found_is_not_fed(system):
    """The tokens of each admission are found or fed: so without preemptions the sums are those of the prompts."""
    heavy = [(*shape[:4], GREEDY) for shape in HEAVY]
    done = modelled(system, heavy)
    steps, requests = done.steps.to_frame(), request_frame(done.requests)
    assert steps.reused_tokens.sum() == requests.reused_tokens.sum() > 0
    if not requests.num_preemptions.sum():
        assert steps.reused_tokens.sum() + steps.prefill_tokens.sum() == requests.prompt_tokens.sum()
    assert 0 < reused_share(steps) < 1
    plain = modelled(system, heavy, cache=False).steps.to_frame()
    assert plain.reused_tokens.sum() == 0 == reused_share(plain)
    assert steps.prefill_tokens.sum() < plain.prefill_tokens.sum()


# ---- counted by hand -------------------------------------------------------------------------------------------

ROOMY = ("paged", {"block_size": 4, "watermark": 0}, "vllm", {}, 1000)


def found_by(system, requests, **options):
    done = serve(system, LAYOUT, requests, lambda policy: ModelledExecutor(MODEL, PRICES), **options)[0]
    return [r.reused_tokens for r in done.requests]


def test_hits_counted_by_hand():
    """Blocks of 8 tokens in the trace, of 4 in memory."""
    load = [
        ([1, 2, 3], 22, 3, GREEDY),  # 0: nothing is there
        ([1, 2, 3], 22, 3, GREEDY),  # 20: five full blocks of 4
        ([1, 2, 4], 24, 3, GREEDY),  # 16: two blocks of 8
        ([1, 2], 16, 3, GREEDY),  # 12: all four would leave nothing to feed
        ([1, 5], 13, 3, PAIR),  # 8, for both of the pair
        ([1, 2, 4], 24, 3, GREEDY),  # 20: as 1, 2, 4 before, but its last token is fed
        ([6, 2, 4], 24, 3, GREEDY),  # 0: the first block differs
    ]
    expected = [0, 20, 16, 12, 8, 8, 20, 0]  # by sequence
    assert found_by(ROOMY, requests_of(load, 10**9)) == expected  # one after the other
    assert found_by(ROOMY, requests_of(load, 0)) == expected  # in one step: what it writes is found in it
    in_chunks = ("paged", {"block_size": 4, "watermark": 0}, "chunked_prefill", CHUNKS, 1000)
    assert found_by(in_chunks, requests_of(load[:2], 10**9)) == [0, 20]
    assert found_by(in_chunks, requests_of(load[3:4] * 2, 0)) == [
        0,
        12,
    ]  # one step apart: the budget is 16
    rows = ("vattention", {"page_group": "64KB"}, "vllm", {}, 4000)  # in units of 4 tokens of a layer
    assert found_by(rows, requests_of(load, 10**9)) == expected


@pytest.mark.parametrize("whole_prompts", [False, True])
def test_a_chunk_is_found_in_the_step_that_writes_it(whole_prompts):
    """A prompt of 30 in chunks of 20 and 10, and one like it: admitted in the second step, which writes the rest."""
    limits = {"token_budget": 20, "max_seqs": 4, "whole_prompts": whole_prompts}
    system = ("paged", {"block_size": 4, "watermark": 0}, "chunked_prefill", limits, 1000)
    requests = requests_of([([1, 2, 3, 4], 30, 2, GREEDY), ([1, 2, 3, 4], 29, 2, GREEDY)], 0)
    _, decisions, _ = serve(system, LAYOUT, requests, lambda policy: ModelledExecutor(MODEL, PRICES))
    assert [d[4] for d in decisions[:2]] == [[(0, 0, 20)], [(0, 20, 10), (1, 28, 1)]]


def test_a_preempted_request_finds_its_own_blocks_again():
    """Nothing else is shared; two requests outgrow the pool, and the later one is recomputed."""
    load = [([1], 8, 24, GREEDY), ([2], 8, 20, GREEDY)]
    small = ("paged", {"block_size": 4, "watermark": 0}, "vllm", {}, 44)
    done, decisions, _ = serve(small, LAYOUT, requests_of(load, 0), lambda policy: ModelledExecutor(MODEL, PRICES))
    assert [r.num_preemptions for r in done.requests] == [0, 1]
    [(_, start, tokens)] = [chunk for d in decisions[1:] for chunk in d[4]]
    assert start == done.requests[1].reused_tokens > 8  # its prompt, and of its output what was not needed
    assert start + tokens > 16


def test_groups_that_are_recomputed_find_their_prompt():
    load = [([1, 2], 14, 20, GREEDY), ([3, 4], 14, 20, PAIR)]
    small = ("paged", {"block_size": 4, "watermark": 0}, "vllm", {"preemption": "recompute"}, 68)
    done = serve(small, LAYOUT, requests_of(load, 0), lambda policy: ModelledExecutor(MODEL, PRICES))[0]
    assert [r.num_preemptions > 0 for r in done.requests] == [False, True, True]
    assert [r.generated for r in done.requests] == [20, 20, 20]


def test_the_engine_finds_what_the_count_says():
    """One request at a time in a large pool: as `experiments/ours/prefix_hits.py` counts them."""
    rng = np.random.default_rng(0)
    shapes = [(int(rng.integers(3)), int(rng.integers(8)), int(rng.integers(1, 64)), 1, GREEDY) for _ in range(60)]
    load = load_of(shapes)
    ids, prompts = [np.array(ids) for ids, *_ in load], np.array([prompt for _, prompt, *_ in load])
    pool = make_policy(config_class("paged")(block_size=4, prefix_cache=True), LAYOUT, 4000 * LAYOUT.token_bytes, 96)
    counted = count_hits(pool, ids, prompts, BLOCK).hit_tokens
    assert sum(found_by(ROOMY, requests_of(load, 10**9))) == counted > 0


def test_a_resident_prefix_comes_before_the_cache_and_a_prefix_that_is_not_resident_is_found():
    prefix = Prefix(-1, 13)
    make = lambda: [Request(i, 20, 2, arrival_ps=i * 10**9, prefix=prefix) for i in range(3)]  # noqa: E731
    assert found_by(ROOMY, make(), prefixes=[prefix]) == [13, 13, 13]
    assert found_by(ROOMY, make()) == [0, 12, 12]
    assert found_by(ROOMY, make(), cache=False) == [0, 0, 0]


# ---- what prompts share ----------------------------------------------------------------------------------------


def test_prompts_have_the_same_tokens_where_they_have_the_same_source():
    first, second, turn, later = (
        Request(0, 22, 1, spans=spans_of_ids([1, 2, 3], 22)), Request(1, 24, 1, spans=spans_of_ids([1, 2, 4], 24)),
        Request(2, 10, 1, spans=conversation_span(1, 10)), Request(3, 30, 1, spans=conversation_span(1, 30)),
    )  # fmt: skip
    known = [Decoder(50_000, seed=3).known(r) for r in (first, second, turn, later)]
    assert known[0][:16] == known[1][:16]
    assert known[0][16:] != known[1][16:22]
    assert known[3][:10] == known[2]
    assert known[2] != known[0][:10]
    assert Decoder(50_000, seed=4).known(first) != known[0]
    assert [len(tokens) for tokens in known] == [22, 24, 10, 30]


def test_names_are_equal_exactly_where_all_tokens_up_to_there_are():
    names = PromptNames(4)
    load = [([1, 2, 3], 22), ([1, 2, 4], 24), ([1, 2], 16), ([5], 4)]
    requests = [Request(i, prompt, 9, spans=spans_of_ids(ids, prompt)) for i, (ids, prompt) in enumerate(load)]
    decoder = Decoder(50_000, seed=0)
    for a in requests:
        for b in requests:
            for j, (mine, other) in enumerate(zip(names.of(a, 24), names.of(b, 24), strict=False)):
                end = 4 * (j + 1)
                if a is not b and end <= min(a.prompt_tokens, b.prompt_tokens):
                    assert (mine == other) == (decoder.known(a)[:end] == decoder.known(b)[:end])
    assert len(names.of(requests[0], 31)) == 7  # of its output too
    assert names.of(requests[0], 31)[5] != names.of(requests[1], 31)[5]
    names.forget(requests[0])
    assert len(names.of(requests[0], 8)) == 2


def test_what_prompts_of_a_workload_share():
    ones, at = np.array([600, 700]), np.array([0, 1])
    ids = (np.array([7, 8]), np.array([7, 9]))
    first, second = make_requests(Workload(ones, ones, at, hash_ids=ids), [GREEDY, GREEDY])
    assert first.spans[0] == second.spans[0]
    assert [(span.start, span.end) for span in second.spans] == [(0, 512), (512, 700)]
    chat = np.array([4, 4])
    turns = make_requests(Workload(ones, ones, at, conversation_ids=chat), [GREEDY, GREEDY])
    assert [span.end for r in turns for span in r.spans] == [600, 700]
    cut = {"trace": {"cut_prompt": 1024}}
    assert make_requests(Workload(ones, ones, at, cut, conversation_ids=chat), [GREEDY, GREEDY])[0].spans == ()
