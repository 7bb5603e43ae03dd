"""Padded batches: who joins, how wide the rows are, and what of them is padding."""

import pytest

from kvarena.allocators.kv_layout import attention_layout
from kvarena.allocators.policy import Admission, Sequence
from kvarena.allocators.reservation.fastertransformer import FasterTransformerConfig, FasterTransformerPolicy
from kvarena.errors import UserError

LAYOUT = attention_layout(2, 2, 8)
TOKEN = LAYOUT.token_bytes


def policy_of(batch_size=5, pool_tokens=15_744, **options):
    return FasterTransformerPolicy(
        FasterTransformerConfig(batch_size=batch_size, **options), LAYOUT, pool_tokens * TOKEN, max_tokens=2048
    )


def admit_all(policy, lengths):
    return [
        policy.admit(Admission([Sequence(i, prompt, output)], prompt)) is not None
        for i, (prompt, output) in enumerate(lengths)
    ]


def test_rows_are_as_wide_as_longest_prompt_plus_longest_output():
    policy = policy_of()
    assert admit_all(policy, [(100, 20), (30, 200), (50, 50)]) == [True] * 3
    assert policy.width == 300
    assert [policy.row(i) for i in range(3)] == [0, 300, 600]
    usage = policy.usage()
    assert usage.live == 180 * TOKEN
    assert usage.reserved == 270 * TOKEN
    assert usage.rounding == (900 - 450) * TOKEN
    assert usage.over_estimate == 0
    assert usage.free == (15_744 - 900) * TOKEN
    policy.check_integrity()


def test_no_row_is_wider_than_the_context():
    """A store's rows hold `max_tokens`: a wider batch would be written past them."""
    policy = FasterTransformerPolicy(FasterTransformerConfig(), LAYOUT, 2048 * TOKEN, max_tokens=64)
    assert admit_all(policy, [(40, 4), (4, 40), (30, 24)]) == [True, False, True]
    assert policy.width == 64


def test_a_row_that_is_done_goes_on_as_padding():
    policy = policy_of()
    admit_all(policy, [(10, 3), (10, 8)])
    for _ in range(8):
        assert policy.grow(0)
        assert policy.grow(1)
    assert not policy.grow(1)
    assert policy.length(0) == policy.length(1) == 18
    assert policy.usage()[:5] == ((13 + 18) * TOKEN, 0, 0, 0, 5 * TOKEN)
    policy.check_integrity()


def test_a_stretch_ends_where_a_row_begins_to_be_padding():
    policy = policy_of()
    admit_all(policy, [(10, 3), (10, 8)])
    assert policy.quiet_steps([0, 1], 8) == 3
    policy.advance([0, 1], 3)
    assert policy.quiet_steps([0, 1], 8) == 5


def test_nobody_joins_a_batch_that_runs():
    policy = policy_of()
    admit_all(policy, [(10, 5)])
    policy.grow(0)
    assert not policy.can_admit(Admission([Sequence(9, 10, 5)], 10))
    policy.release(0)
    assert policy.admit(Admission([Sequence(9, 10, 5)], 10)) is not None


def test_a_batch_is_given_back_as_a_whole():
    policy = policy_of()
    admit_all(policy, [(10, 5), (10, 5)])
    policy.release(0)
    usage = policy.usage()
    assert usage.deferred == usage.retained == 15 * TOKEN
    assert not policy.can_admit(Admission([Sequence(9, 10, 5)], 10))
    with pytest.raises(KeyError):
        policy.row(0)
    policy.check_integrity()
    policy.release(1)
    assert policy.usage().free == policy.pool_bytes


@pytest.mark.parametrize(
    ("lengths", "joined"),
    [
        ([(10, 10)] * 6, 5),  # batch_size
        ([(1000, 10), (10, 1030), (1, 1)], 3),  # 2030 wide
        ([(1000, 10), (10, 1041), (1, 1)], 1),  # 2041 wide; the line stops there
        ([(1500, 545), (1, 1)], 1),  # 2045 wide by itself: runs alone
    ],
)
def test_who_joins(lengths, joined):
    policy = policy_of()
    admitted = 0
    for i, (prompt, output) in enumerate(lengths):
        if policy.admit(Admission([Sequence(i, prompt, output)], prompt)) is None:
            break
        admitted += 1
    assert admitted == joined


def test_the_pool_bounds_the_padded_batch():
    policy = policy_of(pool_tokens=1000)
    assert admit_all(policy, [(100, 100), (100, 100), (300, 100)]) == [True, True, False]  # 3 x 400
    assert policy.width == 200
    assert not policy.refusal(Admission([Sequence(9, 500, 500)], 0))
    assert policy.refusal(Admission([Sequence(9, 500, 501)], 0))


def test_bad_batch_size():
    with pytest.raises(UserError, match=r"allocator\.batch_size: 0 is not at least 1"):
        policy_of(batch_size=0)
