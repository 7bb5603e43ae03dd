"""Groups in the serving loop: the same tokens whatever shares, copies, preempts or swaps, and the same decisions under
both clocks.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from two_clocks import Keeper, Scripted, noted_decisions

from kvarena.allocators.actions import CopyBlock, CopyRow
from kvarena.allocators.registry import config_class, make_policy
from kvarena.allocators.stores import make_store
from kvarena.harness.config import load, typed
from kvarena.harness.decoding.decoder import Decoder
from kvarena.harness.decoding.sampling import sample
from kvarena.harness.engine.engine import Engine
from kvarena.harness.model import ModelConfig
from kvarena.harness.model.build import build_model
from kvarena.harness.requests.decoding import GREEDY, DecodingConfig
from kvarena.harness.requests.group import Group
from kvarena.harness.requests.request import Request, RequestState
from kvarena.harness.scheduler.registry import config_class as scheduler_class
from kvarena.harness.scheduler.registry import make_scheduler
from kvarena.kernels.registry import get_kernel

CONFIG = typed(ModelConfig, load("model", "tiny-llama"), "model")
LAYOUT = CONFIG.kv_layout()
MAX_TOKENS = 64
SAMPLES, PAIR, BEAM = DecodingConfig("parallel", 3), DecodingConfig("parallel", 2, seed=7), DecodingConfig("beam", 3)
SAMPLE = DecodingConfig("parallel", 1)
LOAD = [  # prompt, output, decoding
    (23, 14, BEAM), (7, 20, GREEDY), (16, 9, SAMPLES), (3, 25, PAIR), (31, 12, BEAM), (12, 18, SAMPLE),
    (17, 5, SAMPLES), (26, 12, BEAM), (5, 1, PAIR), (9, 23, GREEDY), (20, 11, SAMPLES), (8, 1, BEAM),
]  # fmt: skip
SWAP_BYTES = 600 * LAYOUT.token_bytes
CHUNKS = {"token_budget": 16, "max_seqs": 16}
SYSTEMS = {
    "recomputing": ("paged", {"block_size": 4}, "vllm", {"preemption": "recompute"}, 200),
    "swapping": ("paged", {"block_size": 4, "swap_bytes": SWAP_BYTES}, "vllm", {}, 200),
    "in chunks": ("paged", {"block_size": 4, "watermark": 0}, "chunked_prefill", CHUNKS, 140),
    "copying blocks": ("paged_reserved", {"block_size": 4}, "orca", {}, 500),
    "copying chunks": ("orca_oracle", {"block_size": 4}, "orca", {}, 500),
    "copying extents": ("contiguous", {}, "orca", {}, 500),
    "copying rows": ("static", {}, "vllm", {}, 640),
    "mapping rows": ("vattention", {"page_group": "64KB", "max_rows": 16}, "vllm", {}, 5120),
    "padded batches": ("fastertransformer", {"batch_size": 6}, "fastertransformer", {}, 640),
}

WIDE = replace(CONFIG, hidden_size=1024, num_heads=16, num_kv_heads=16, head_size=64)  # 64 KB hold 16 tokens
WIDE_SYSTEMS = {
    "copying rows": ("static", {}, "vllm", {}, 640),
    "sharing page-groups": ("vattention", {"page_group": "64KB", "max_rows": 16}, "vllm", {}, 272),
    "mapping at once": ("vattention", {"page_group": "64KB", "max_rows": 16, "overlap": False}, "vllm", {}, 272),
    "in chunks": ("vattention", {"page_group": "64KB", "max_rows": 16}, "chunked_prefill", CHUNKS, 272),
}


@pytest.fixture(scope="module")
def model():
    return build_model(CONFIG, "cpu")


def requests_of(load, gap_ps):
    requests = []
    for i, (prompt, output, decoding) in enumerate(load):
        first = len(requests)
        gang = [Request(first + j, prompt, output, arrival_ps=i * gap_ps, decoding=decoding) for j in range(decoding.n)]
        if len(gang) > 1:
            Group(gang)
        requests += gang
    return requests


def serve(system, executor_of, gap_ps=10**9, layout=LAYOUT, only=None):
    """Serve LOAD, or `only` the request of that id. Returns the replay, its decisions and the executor."""
    allocator, options, name, limits, tokens = system
    config = replace(typed(config_class(allocator), load("allocator", allocator), "allocator"), **options)
    policy = make_policy(config, layout, tokens * layout.token_bytes, MAX_TOKENS)
    scheduler = make_scheduler(scheduler_class(name)(name=name, **limits), policy, MAX_TOKENS)
    decisions = noted_decisions(scheduler)
    executor = executor_of(policy)
    requests = [r for r in requests_of(LOAD, gap_ps) if only in (None, r.request_id)]
    done = Engine(scheduler, executor, jump=False).run(requests)
    assert policy.usage().live == 0, "a finished replay leaks nothing"
    return done, decisions, executor


def measured(system, model, **load):
    config = model.config

    def executor_of(policy):
        store = make_store(policy, config.num_layers, config.num_kv_heads, config.head_size, config.dtype)
        return Keeper(model, store, get_kernel("numba"))

    done, decisions, executor = serve(system, executor_of, layout=config.kv_layout(), **load)
    executor.store.close()
    return done, decisions, executor


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_same_step_times_and_survivors_give_the_same_decisions(system, model):
    done, decisions, executor = measured(SYSTEMS[system], model)
    rows = done.steps.to_frame()
    replayed, again, _ = serve(SYSTEMS[system], lambda policy: Scripted(rows.duration_ps.tolist(), executor.lived_on))
    assert again == decisions
    assert [r.finish_ps for r in replayed.requests] == [r.finish_ps for r in done.requests]
    assert all(r.state is RequestState.FINISHED for r in done.requests)


def test_every_path_through_memory_yields_the_same_tokens(model):
    said, preempted, copies = {}, {}, {}
    for system in SYSTEMS:
        _, decisions, executor = measured(SYSTEMS[system], model, gap_ps=0)
        said[system] = executor.finished
        preempted[system] = sum(len(d[1]) for d in decisions), sum(len(d[2]) for d in decisions)
        copies[system] = sum(isinstance(a, CopyBlock | CopyRow) for d in decisions for a in d[5])
    groups = {r.seq_id for r in requests_of(LOAD, 0) if r.group}
    assert preempted["recomputing"][0] > 0
    assert preempted["swapping"][1] > 0
    assert preempted["in chunks"][0] > 0
    for system in SYSTEMS:
        assert said[system].keys() == said["copying rows"].keys(), system
        for seq_id, tokens in said["copying rows"].items():
            mine = said[system][seq_id]
            if system == "padded batches":
                mine = mine[: len(tokens)]  # what a row says after its end is padding
            assert mine == tokens, (system, seq_id, seq_id in groups)
        assert copies[system] > 0, system


def test_company_changes_nothing(model):
    """Alone in an empty server each request says the same."""
    _, _, together = measured(SYSTEMS["recomputing"], model, gap_ps=0)
    for request_id in sorted({r.request_id for r in requests_of(LOAD, 0)}):
        _, _, alone = measured(SYSTEMS["copying rows"], model, only=request_id)
        assert {seq_id: together.finished[seq_id] for seq_id in alone.finished} == alone.finished


def test_page_groups_that_several_rows_map_yield_the_same_tokens():
    """A wider model, so that a page-group ends within a prompt and rows share the ones before."""
    model, said = build_model(WIDE, "cpu"), {}
    for system, parts in WIDE_SYSTEMS.items():
        done, decisions, executor = measured(parts, model, gap_ps=0)
        said[system] = executor.finished
        assert said[system] == said["copying rows"], system
        if system != "copying rows":
            assert done.steps.to_frame().shared_bytes.max() > 0, "rows share page-groups"
            assert sum(len(d[1]) for d in decisions) > 0, "groups are recomputed"


def scores_after(model, tokens):
    """Scores of the next token, from a forward pass over all tokens, without a cache: [V]."""

    def attend(layer, q, k, v):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        rows = (x.transpose(0, 1) for x in (q, k, v))  # [H, T, D]
        return torch.nn.functional.scaled_dot_product_attention(*rows, is_causal=True).transpose(0, 1)

    count = len(tokens)
    logits = model.forward(torch.tensor(tokens), torch.arange(count), attend, torch.tensor([count - 1]))
    return logits[0].numpy()


def sampled_slowly(model, gang, prompt):
    said = []
    for member, request in enumerate(gang):
        tokens = list(prompt)
        for _ in range(request.output_tokens):
            scores = scores_after(model, tokens)
            tokens.append(sample(scores, request.decoding, request.request_id, member, len(tokens)))
        said.append(tokens[len(prompt) :])
    return said


def searched_slowly(model, gang, prompt):
    beams = [(0.0, list(prompt))]
    for _ in range(gang[0].output_tokens):
        longer = []
        for total, tokens in beams:
            log_probs = torch.log_softmax(torch.from_numpy(scores_after(model, tokens)).double(), 0).numpy()
            longer += [(total + log_probs[t], [*tokens, int(t)]) for t in np.argsort(-log_probs)[: len(gang)]]
        beams = sorted(longer, key=lambda beam: -beam[0])[: len(gang)]
    return [tokens[len(prompt) :] for _, tokens in beams]


def test_samples_and_beams_are_those_of_a_model_without_a_cache(model):
    _, _, executor = measured(SYSTEMS["recomputing"], model, gap_ps=0)
    groups = [r.gang for r in requests_of(LOAD, 0) if r.group and r.leads]
    for gang in groups[:4]:
        prompt = Decoder(CONFIG.vocab_size, seed=0).known(gang[0])
        said = [executor.finished[r.seq_id] for r in gang]
        if gang[0].decoding.is_beam:
            assert sorted(said) == sorted(searched_slowly(model, gang, prompt))
        else:
            assert said == sampled_slowly(model, gang, prompt)
    assert {gang[0].decoding.name for gang in groups[:4]} == {"beam", "parallel"}
