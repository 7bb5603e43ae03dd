"""A kept prefix is no member of anybody's gang: what must fit is the gang, beside what the prefixes occupy."""

from dataclasses import replace

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from kvarena.allocators.kv_layout import attention_layout
from kvarena.allocators.paged.policy import PagedConfig, PagedPolicy
from kvarena.allocators.policy import Admission, Sequence
from kvarena.allocators.registry import config_class, make_policy
from kvarena.allocators.vattention.policy import VAttentionConfig, VAttentionPolicy
from kvarena.errors import UserError
from kvarena.harness.config import load, typed
from kvarena.harness.engine.engine import Engine
from kvarena.harness.modelled.modelled_executor import ModelledExecutor
from kvarena.harness.modelled.step_model import StepModel
from kvarena.harness.requests.decoding import GREEDY, DecodingConfig
from kvarena.harness.requests.group import Group
from kvarena.harness.requests.prefix import Prefix
from kvarena.harness.requests.request import Request, RequestState
from kvarena.harness.scheduler.registry import config_class as scheduler_class
from kvarena.harness.scheduler.registry import make_scheduler

MAX_TOKENS = 64
LAYOUT = attention_layout(num_layers=2, num_kv_heads=64, head_size=128)  # a page-group of 64 KB holds 4 tokens
ONE_EACH = StepModel(False, 100, 0, 0, 0, 0)
POLICIES = {
    "paged": {"block_size": 4},
    "paged, a watermark": {"block_size": 4, "watermark": 0.1},
    "paged, swapping": {"block_size": 4, "swap_bytes": 300 * LAYOUT.token_bytes},
    "vattention": {"page_group": "64KB", "max_rows": 6},
    "vattention, straddling": {"page_group": "128KB", "tensor_slicing": True, "max_rows": 6, "read_past": 3},
    "static": {},
    "orca_pow2": {"block_size": 4},
    "contiguous": {},
    "paged_reserved": {"block_size": 4},
}


def policy_of(case, tokens):
    name = case.partition(",")[0]
    config = replace(typed(config_class(name), load("allocator", name), "allocator"), **POLICIES[case])
    return make_policy(config, LAYOUT, tokens * LAYOUT.token_bytes, MAX_TOKENS)


def gang_of(first, prompt, output, n, prefix=None):
    decoding = DecodingConfig("parallel", n) if n > 1 else GREEDY
    gang = [Request(first + i, prompt, output, decoding=decoding, prefix=prefix) for i in range(n)]
    if n > 1:
        Group(gang)
    return gang


LENGTHS = st.tuples(
    st.integers(1, 30), st.integers(1, 30), st.integers(1, 4)
)  # beyond a prefix: prompt, output, members
PREFIXES = st.lists(st.integers(1, 30), min_size=1, max_size=2)


def gangs_of(shapes, prefixes):
    """Gangs, every other of which begins with one of the prefixes."""
    gangs, first = [], 0
    for prompt, output, n, named in shapes:
        prefix = prefixes[named % len(prefixes)] if named else None
        gangs.append(gang_of(first, prompt + (prefix.tokens if prefix else 0), output, n, prefix))
        first += n
    return gangs


@pytest.mark.parametrize("scheduler", ["vllm", "chunked_prefill"])
@pytest.mark.parametrize("case", POLICIES)
@settings(max_examples=25)
@given(
    tokens=st.integers(80, 300),
    kept=PREFIXES,
    shapes=st.lists(
        st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(1, 4), st.integers(0, 2)), max_size=4
    ),
)
@example(tokens=92, kept=[8], shapes=[(1, 9, 4, 0), (2, 21, 3, 1)])  # comes back with the prefix's blocks as its own
def test_whoever_is_accepted_ends(case, scheduler, tokens, kept, shapes):
    """Alone beside the prefixes, and among others, whom it has to make room for."""
    prefixes = [Prefix(-1 - i, n) for i, n in enumerate(kept)]
    policy = policy_of(case, tokens)
    limits = {} if scheduler == "vllm" else {"token_budget": 40, "max_seqs": 40}
    made = make_scheduler(scheduler_class(scheduler)(name=scheduler, **limits), policy, MAX_TOKENS)
    try:
        engine = Engine(made, ModelledExecutor(ONE_EACH), prefixes=prefixes)
    except UserError:
        assume(False)
    done = engine.run([request for gang in gangs_of(shapes, prefixes) for request in gang])
    assert {r.state for r in done.requests} <= {RequestState.FINISHED, RequestState.REFUSED}
    policy.check_integrity()


def fits(policy, kept, gang, prefix=None):
    """Whether a gang could run to its end beside these prefixes, and they be kept."""
    try:
        for each in kept:
            policy.sharing.keep_prefix(each.seq_id, each.prompt_tokens)
    except UserError:
        return False
    return not policy.refusal(Admission(gang, gang[0].prompt_tokens, prefix=prefix))


def materialised(policy, kept, gang, prefix, length):
    """An ample pool that holds the prefixes and a gang whose members have drifted apart, up to a length."""
    for each in kept:
        policy.sharing.keep_prefix(each.seq_id, each.prompt_tokens)
    policy.drain()
    assert policy.admit(Admission(gang, gang[0].prompt_tokens, prefix=prefix)) is not None
    policy.drain()
    for seq in gang:
        assert policy.grow(seq.seq_id, length - gang[0].prompt_tokens)
    policy.drain()
    policy.check_integrity()
    return policy


@settings(max_examples=200)
@given(kept=PREFIXES, shape=LENGTHS, named=st.booleans(), block_size=st.sampled_from([1, 3, 4, 16]))
def test_blocks_are_counted_exactly(kept, shape, named, block_size):
    """The pool that suffices is the one that holds what the tables hold before the last token, and a block for each."""
    extra, output, n = shape
    prefixes = [Sequence(-1 - i, tokens, 0) for i, tokens in enumerate(kept)]
    prompt, prefix = extra + (kept[0] if named else 0), -1 if named else None
    assume(prompt + output <= MAX_TOKENS)
    gang = [Sequence(i, prompt, output) for i in range(n)]

    def pool(blocks):
        num_bytes = blocks * block_size * LAYOUT.token_bytes
        return PagedPolicy(PagedConfig(block_size=block_size, watermark=0), LAYOUT, num_bytes, max_tokens=MAX_TOKENS)

    used = materialised(pool(1000), prefixes, gang, prefix, prompt + output - 1)
    needed = used.num_blocks - used.free_units + n
    if output == 1 and n > 1:
        needed += (n - 1) * (prompt % block_size > 0)  # they have yet to part
    assert fits(pool(needed), prefixes, gang, prefix)
    assert not fits(pool(needed - 1), prefixes, gang, prefix)


@settings(max_examples=100)
@given(kept=PREFIXES, shape=LENGTHS, named=st.booleans(), sliced=st.booleans())
def test_page_groups_are_counted_exactly(kept, shape, named, sliced):
    extra, output, n = shape
    prefixes = [Sequence(-1 - i, tokens, 0) for i, tokens in enumerate(kept)]
    prompt, prefix = extra + (kept[0] if named else 0), -1 if named else None
    assume(prompt + output <= MAX_TOKENS)
    gang = [Sequence(i, prompt, output) for i in range(n)]
    size = 64 << 10

    def pool(page_groups, rows=8):
        return VAttentionPolicy(
            VAttentionConfig(page_group=size, max_rows=rows, watermark=0, tensor_slicing=sliced),
            LAYOUT,
            page_groups * size,
            max_tokens=MAX_TOKENS,
        )

    usage = materialised(pool(2000), prefixes, gang, prefix, prompt + output).usage()
    needed = (usage.live + usage.reserved + usage.rounding) // size
    tensors = pool(2000).geometries[0].num_tensors
    assert fits(pool(needed), prefixes, gang, prefix)
    assert not fits(pool(max(tensors, needed - tensors)), prefixes, gang, prefix)
    assert not fits(pool(2000, rows=n + len(kept) - 1), prefixes, gang, prefix)


def test_six_samples_of_a_prompt_share_it_beside_a_short_prefix():
    """400 tokens are 25 full blocks once, and 6 x 1 beside them; taken for a member, the prefix would unshare them."""
    policy = PagedPolicy(PagedConfig(watermark=0), LAYOUT, 64 * 16 * LAYOUT.token_bytes, max_tokens=2048)
    gang = [Sequence(i, 400, 16) for i in range(6)]
    policy.sharing.keep_prefix(-1, 16)
    assert not policy.refusal(Admission(gang, 400, prefix=-1))
    assert not policy.refusal(Admission(gang, 400))


def test_a_request_that_does_not_share_the_prefix_must_fit_beside_it():
    policy = PagedPolicy(
        PagedConfig(block_size=4, watermark=0), LAYOUT, 20 * 4 * LAYOUT.token_bytes, max_tokens=MAX_TOKENS
    )
    policy.sharing.keep_prefix(-1, 40)
    assert not policy.refusal(Admission([Sequence(0, 44, 8)], 44, prefix=-1))
    assert policy.refusal(Admission([Sequence(0, 44, 8)], 44))


def test_a_policy_that_keeps_no_prefixes_says_so():
    policy = make_policy(config_class("fastertransformer")(), LAYOUT, 1 << 22, MAX_TOKENS)
    scheduler = make_scheduler(scheduler_class("vllm")(), policy, MAX_TOKENS)
    with pytest.raises(UserError, match="keeps no prefixes"):
        scheduler.keep_prefix(Prefix(-1, 8))
