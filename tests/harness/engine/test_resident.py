"""A batch that is resident from the start stands where the step before the first would have left it."""

import pytest

from kvarena.allocators.kv_layout import attention_layout
from kvarena.allocators.policy import Map, Sequence
from kvarena.allocators.vattention.policy import VAttentionConfig, VAttentionPolicy
from kvarena.errors import UserError
from kvarena.harness.engine.resident import make_resident

LAYOUT = attention_layout(num_layers=2, num_kv_heads=64, head_size=128)  # a page-group of 64 KB holds 4 tokens


@pytest.mark.parametrize(("overlap", "mapped"), [(True, []), (False, [0, 1, 2])])
def test_full_rows_are_mapped_ahead_of_the_first_step(overlap, mapped):
    policy = VAttentionPolicy(
        VAttentionConfig(page_group="64KB", overlap=overlap), LAYOUT, 400 * LAYOUT.token_bytes, max_tokens=64
    )
    seqs = [Sequence(i, 8, 20) for i in range(3)]  # each fills two page-groups
    actions = make_resident(policy, seqs)
    assert {action.row for action in actions if isinstance(action, Map)} >= {policy.row(i) for i in range(3)}
    assert policy.grow_each([0, 1, 2]) == 3
    assert [action.row for action in policy.drain()] == [policy.row(i) for i in mapped]


def test_a_batch_that_does_not_fit_says_how_many_do():
    policy = VAttentionPolicy(
        VAttentionConfig(page_group="64KB", watermark=0), LAYOUT, 100 * LAYOUT.token_bytes, max_tokens=64
    )
    with pytest.raises(UserError, match=r"a batch of 9 .* 4 sequences fit"):
        make_resident(policy, [Sequence(i, 24, 8) for i in range(9)])
