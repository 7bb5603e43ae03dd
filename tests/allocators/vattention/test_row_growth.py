"""Stretches of vAttention's steps against the same steps one by one: what is mapped and given back, and the leaves."""

from copy import deepcopy

import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from kvarena.allocators.actions import Action, Map
from kvarena.allocators.kv_layout import attention_layout, latent_layout
from kvarena.allocators.policy import Admission, Sequence
from kvarena.allocators.sizes import KB
from kvarena.allocators.usage import Usage
from kvarena.allocators.vattention.policy import VAttentionConfig, VAttentionPolicy

MAX_TOKENS = 160
LAYOUTS = (
    attention_layout(1, 64, 128, "float32"),  # 2 tokens a page-group
    attention_layout(2, 24, 120, "float16"),  # 11.4: a token straddles
    latent_layout(3, 4000),  # 8.2
    attention_layout(2, 96, 256, "float32"),  # 2/3: a token takes two page-groups, or sliced three
)
PROGRAMS = st.fixed_dictionaries(
    {
        "page_groups": st.integers(20, 160),
        "lengths": st.lists(st.tuples(st.integers(1, 60), st.integers(1, 100)), min_size=1, max_size=8),
        "leave": st.lists(st.integers(0, 7), max_size=4),  # soon, so that idle rows have something to give back
        "most": st.sampled_from([1, 2, 3, 100]),
    }
)
SWITCHES = st.fixed_dictionaries(
    {
        "deferred_reclamation": st.booleans(),
        "eager_allocation": st.booleans(),
        "reclaim_threshold": st.sampled_from([0.0, 0.1, 0.5]),
        "tensor_slicing": st.booleans(),
    }
)


def place(action: Action) -> tuple[str, int, int, int]:
    """An action without its page-group, which may be another when many steps are taken at once."""
    return type(action).__name__, action.group, action.row, action.ordinal


def planned(policy: VAttentionPolicy) -> None:
    policy.drain()
    policy.look_ahead()


def check_stretch(policy: VAttentionPolicy, ids: list[int], steps: int, most: int) -> None:
    walked, usages, actions = deepcopy(policy), [], []
    for _ in range(steps):
        assert walked.grow_each(ids) == len(ids)
        assert walked.drain() == []
        ahead = walked.look_ahead()
        maps = sum(isinstance(action, Map) for action in ahead)
        assert len(ahead) - maps <= maps <= most
        usages.append(walked.usage())
        actions += ahead
    assert policy.advance(ids, steps) == Usage(*map(sum, zip(*usages, strict=True)))
    jumped = policy.look_ahead()
    event(f"maps: {any(isinstance(action, Map) for action in jumped)}")
    assert sorted(map(place, jumped)) == sorted(map(place, actions))
    policy.check_integrity()
    assert policy.usage() == walked.usage()
    assert policy.look_ahead() == []


@pytest.mark.parametrize("layout", LAYOUTS, ids=["2 tokens", "11.4 tokens", "8.2 tokens", "2/3 token"])
@settings(max_examples=60, deadline=None)
@given(program=PROGRAMS, switches=SWITCHES)
@example(program={"page_groups": 160, "lengths": [(60, MAX_TOKENS - 60)], "leave": [], "most": 100}, switches={})
def test_a_stretch_is_its_steps_one_by_one(layout, program, switches):
    tensors = sum(group.num_tensors for group in layout.groups)
    pool_bytes = program["page_groups"] * tensors * 64 * KB
    policy = VAttentionPolicy(
        VAttentionConfig(max_rows=8, page_group="64KB", **switches), layout, pool_bytes, max_tokens=MAX_TOKENS
    )
    finals = {}
    for seq_id, (prompt, output) in enumerate(program["lengths"]):
        if policy.admit(Admission([Sequence(seq_id, prompt, output)], prompt)) is not None:
            finals[seq_id] = prompt + output
    planned(policy)
    for seq_id in program["leave"]:
        if finals.pop(seq_id, None):
            policy.release(seq_id)
    planned(policy)
    while finals:
        ids = list(finals)
        left = min(finals[seq_id] - policy.length(seq_id) for seq_id in ids)
        steps = policy.quiet_steps(ids, left, program["most"]) if left else 0
        if steps:
            check_stretch(policy, ids, steps, program["most"])
        elif left == 0 or policy.grow_each(ids) < len(ids):
            finals.pop(ids[-1])
            policy.release(ids[-1])
        planned(policy)


def test_a_stretch_ends_where_a_step_would_map_too_much():
    policy = VAttentionPolicy(
        VAttentionConfig(max_rows=8, page_group="64KB"), LAYOUTS[0], 400 * 64 * KB, max_tokens=MAX_TOKENS
    )
    for seq_id, prompt in enumerate((1, 3, 4)):  # the first two are full after an odd step, the third after an even one
        policy.admit(Admission([Sequence(seq_id, prompt, 100)], prompt))
    planned(policy)
    assert policy.quiet_steps([0, 1, 2], 100, 2) == 100
    assert policy.quiet_steps([0, 1, 2], 100, 1) == 0
    assert policy.quiet_steps([0, 2], 100, 1) == 100


def test_a_stretch_ends_where_memory_does():
    policy = VAttentionPolicy(
        VAttentionConfig(max_rows=2, page_group="64KB", watermark=0.0, eager_allocation=False),
        LAYOUTS[0],
        20 * 64 * KB,
        max_tokens=MAX_TOKENS,
    )
    assert policy.admit(Admission([Sequence(0, 1, 60)], 1)) is not None
    planned(policy)
    assert policy.quiet_steps([0], 60, 9) == 18  # 10 page-groups hold 20 tokens, the one ahead included
    policy.advance([0], 18)
    planned(policy)
    assert policy.grow(0)
    planned(policy)
    assert policy.quiet_steps([0], 60, 9) == 0
