"""The vAttention policy: growth, each switch by its counts, and the books."""

from dataclasses import replace

import pytest
from vattention_by_hand import ALL_OFF, LAYOUT, PAIR, TOKENS, admit, counts, policy_of

from kvarena.allocators.kv_layout import attention_layout, sliding_layout
from kvarena.allocators.policy import Admission, IntegrityError, Map, Sequence
from kvarena.allocators.registry import config_class, make_policy
from kvarena.allocators.sizes import KB
from kvarena.allocators.usage import Usage
from kvarena.allocators.vattention.policy import VAttentionConfig, VAttentionPolicy
from kvarena.errors import UserError

# ---- growth ----------------------------------------------------------------------------------------------------


def test_a_prompt_takes_the_page_groups_it_needs_as_one_ascending_run():
    policy = policy_of()
    assert policy.admit(Admission([Sequence(7, 130, 20)], 130)) is not None
    row = policy.row(7)
    assert policy.drain() == [Map(0, row, 0, 0), Map(0, row, 1, 1), Map(0, row, 2, 2)]
    assert policy.drain() == []
    assert policy.mapped_bytes == 3 * PAIR
    assert policy.tokens_until_growth(7) == 3 * TOKENS - 130


def test_growth_maps_one_more_when_a_page_group_is_full():
    policy = policy_of()
    admit(policy, 0, 1, 3)
    policy.drain()
    assert policy.grow(0)
    assert counts(policy.drain()) == (1, 0)
    assert policy.grow(0, TOKENS - 1)
    assert policy.drain() == []
    assert policy.grow(0, TOKENS)
    assert counts(policy.drain()) == (1, 0)
    assert policy.length(0) == 3 * TOKENS


def test_refusals_change_nothing():
    policy = policy_of(page_groups=4, rows=2)
    assert admit(policy, 0, 3)
    usage = policy.usage()
    assert not admit(policy, 1, 2)
    assert not policy.grow(0, 2 * TOKENS)
    assert policy.usage() == usage
    assert admit(policy, 1, 1)
    assert not policy.can_admit(Admission([Sequence(2, 1, 1)], 0))  # no row is left
    assert not policy.grow(1)
    assert not policy.grow(0, 2000)  # past the row's end
    policy.check_integrity()


def test_what_can_never_fit():
    policy = policy_of(page_groups=8, watermark=0.25)
    assert not policy.refusal(Admission([Sequence(0, 6 * TOKENS, 0)], 0))
    assert policy.refusal(Admission([Sequence(0, 6 * TOKENS, 1)], 0))  # it could not come back, with the watermark free
    assert policy_of(page_groups=100).refusal(Admission([Sequence(0, 1000, 25)], 0))  # longer than a row


def test_the_watermark_binds_admission_only():
    policy = policy_of(page_groups=8, watermark=0.25)
    assert admit(policy, 0, 5, 8)
    assert not policy.can_admit(Admission([Sequence(1, 2 * TOKENS, 0)], 2 * TOKENS))
    assert policy.can_admit(Admission([Sequence(1, TOKENS, 0)], TOKENS))
    assert policy.grow(0, 3 * TOKENS)


def test_misuse_is_an_error_of_the_caller():
    policy = policy_of()
    admit(policy, 0, 1)
    with pytest.raises(ValueError, match="sequence 0 is resident"):
        admit(policy, 0, 1)
    for call in (policy.grow, policy.release, policy.length, policy.row):
        with pytest.raises(KeyError):
            call(5)


# ---- switches --------------------------------------------------------------------------------------------------


def test_overlap_maps_ahead_so_that_growth_finds_it_mapped():
    for overlap, critical in ((False, 3), (True, 0)):
        policy = policy_of(overlap=overlap)
        admit(policy, 0, 1, 4)
        admission = counts(policy.drain())
        policy.look_ahead()
        on_critical_path = in_background = 0
        for _ in range(3 * TOKENS):
            assert policy.grow(0)
            on_critical_path += len(policy.drain())
            in_background += len(policy.look_ahead())
            policy.check_integrity()
        assert admission == (1, 0)
        assert on_critical_path == critical
        assert in_background == (3 if overlap else 0)  # the first was mapped ahead of these steps, a fifth after them


def test_without_deferred_reclamation_a_row_is_emptied_when_its_request_ends():
    policy = policy_of()
    admit(policy, 0, 3)
    policy.drain()
    policy.release(0)
    assert counts(policy.drain()) == (0, 3)
    assert policy.usage().free == 8 * PAIR


def test_with_deferred_reclamation_the_next_request_inherits_the_row():
    policy = policy_of(deferred_reclamation=True)
    admit(policy, 0, 3)
    row = policy.row(0)
    policy.drain()
    policy.release(0)
    assert policy.drain() == []
    assert policy.usage().deferred == 3 * PAIR
    admit(policy, 1, 5)
    assert policy.row(1) == row
    assert counts(policy.drain()) == (2, 0)  # only the excess


def test_eager_allocation_keeps_one_idle_row_ready():
    policy = policy_of(eager_allocation=True, eager_groups=2)
    assert counts(policy.look_ahead()) == (2, 0)
    assert policy.look_ahead() == []
    assert policy.usage().premapped == 2 * PAIR
    admit(policy, 0, 2)
    assert policy.drain() == []  # nothing on the critical path
    assert counts(policy.look_ahead()) == (2, 0)  # another is got ready
    assert policy.usage().premapped == 2 * PAIR
    admit(policy, 1, 3)
    assert counts(policy.drain()) == (1, 0)


def test_a_row_with_enough_left_from_before_is_the_slot_without_mapping():
    policy = policy_of(eager_allocation=True, deferred_reclamation=True)
    admit(policy, 0, 3)
    policy.drain()
    policy.release(0)
    assert policy.look_ahead() == []
    usage = policy.usage()
    assert (usage.premapped, usage.deferred) == (PAIR, 2 * PAIR)


def test_below_the_threshold_idle_rows_give_back_in_the_background():
    policy = policy_of(page_groups=10, deferred_reclamation=True, reclaim_threshold=0.3)
    admit(policy, 0, 4)
    admit(policy, 1, 5)
    policy.drain()
    policy.release(0)
    assert policy.usage().free == 1 * PAIR
    assert counts(policy.look_ahead()) == (0, 2)
    usage = policy.usage()
    assert (usage.free, usage.deferred) == (3 * PAIR, 2 * PAIR)
    assert policy.look_ahead() == []


def test_the_slot_is_neither_filled_from_nor_emptied_for_the_threshold():
    policy = policy_of(page_groups=4, eager_allocation=True, eager_groups=1, reclaim_threshold=0.5)
    admit(policy, 0, 1)
    assert counts(policy.look_ahead()) == (1, 0)
    admit(policy, 1, 2)  # a page-group of it comes from the slot, so that 1 is free: below the threshold
    assert policy.usage().premapped == 0
    assert policy.look_ahead() == []


def test_tensor_slicing_maps_two_tensors_with_few_tokens_each():
    layout = attention_layout(8, 4, 128)
    config = VAttentionConfig(**ALL_OFF, page_group="64KB", max_rows=4)
    plain = VAttentionPolicy(config, layout, 8 * 1024 * KB, 1024)
    sliced = VAttentionPolicy(replace(config, tensor_slicing=True), layout, 8 * 1024 * KB, 1024)
    seq = Sequence(0, 9, 0)
    assert plain.admit(Admission([seq], 9)) is not None
    assert sliced.admit(Admission([seq], 9)) is not None
    assert (plain.page_groups_per_tensor, sliced.page_groups_per_tensor) == (8, 64)
    assert plain.mapped_bytes == 16 * 64 * KB  # one page-group in each tensor, for 64 tokens
    assert sliced.mapped_bytes == 2 * 2 * 64 * KB  # two page-groups of 8 tokens in two tensors
    assert plain.usage().rounding == plain.mapped_bytes - 9 * 16 * KB
    assert sliced.usage().rounding == sliced.mapped_bytes - 9 * 16 * KB


# ---- the books -------------------------------------------------------------------------------------------------


def test_every_leaf():
    """In pairs of 64 tokens: 3.5 mapped to the end of what is final, one mapped ahead, one left by a former request."""
    policy = policy_of(page_groups=12, rows=3, more=5, deferred_reclamation=True)
    admit(policy, 9, 6)
    admit(policy, 8, 1)
    policy.release(9)
    policy.release(8)
    policy.admit(
        Admission([Sequence(0, 2 * TOKENS + 10, TOKENS + 12)], 2 * TOKENS + 10)
    )  # ends after 3 page-groups and 22 tokens
    policy.drain()
    byte = PAIR // TOKENS
    assert policy.usage() == Usage(
        live=(2 * TOKENS + 10) * byte,
        reserved=(TOKENS + 12) * byte,
        rounding=(TOKENS - 22) * byte,
        retained=3 * PAIR,
        free=5 * PAIR,
        remainder=5,
        deferred=1 * PAIR,
        surplus=2 * PAIR,
    )


def test_what_is_mapped_ahead_is_reserved_below_the_final_length_and_surplus_above():
    policy = policy_of(overlap=True)
    admit(policy, 0, 1, 2)
    admit(policy, 1, 1, 1)
    policy.look_ahead()
    usage = policy.usage()
    assert (usage.live, usage.reserved, usage.surplus) == (2 * PAIR, PAIR, PAIR)


def test_quiet_steps_leave_nothing_to_do_in_the_background():
    policy = policy_of(overlap=True, eager_allocation=True)
    assert policy.admit(Admission([Sequence(0, 4, 200)], 4)) is not None
    assert policy.quiet_steps([0], 100) == 0  # its mappings wait to be performed
    policy.drain()
    assert policy.quiet_steps([0], 100) == 0  # and no slot is ready
    policy.look_ahead()
    assert policy.tokens_until_growth(0) == TOKENS - 4
    assert policy.quiet_steps([0], 100) == TOKENS - 5  # in the step after these the next page-group is mapped
    policy.advance([0], TOKENS - 5)
    assert policy.look_ahead() == []
    assert policy.grow(0)
    assert counts(policy.look_ahead()) == (1, 0)
    assert admit(policy, 1, 1)
    policy.drain(), policy.look_ahead()
    assert policy.quiet_steps([0], 100) > 0
    policy.release(1)
    assert policy.drain()
    assert policy.quiet_steps([0], 100) == 0  # an idle row: the background may want it
    policy.look_ahead()
    assert policy.grow(0, TOKENS + 5)
    policy.drain()
    assert policy.tokens_until_growth(0) > 1
    assert policy.quiet_steps([0], 100) == 0  # what it took may have been the slot's, or the threshold's


def test_a_window_fills_its_ring_and_no_more():
    layout = sliding_layout(1, 1, 100, 4, 128, "float16")  # a full layer, and one that sees 100 positions
    policy = VAttentionPolicy(
        VAttentionConfig(**ALL_OFF, page_group="64KB", max_rows=2), layout, 64 * PAIR, max_tokens=1024
    )
    policy.admit(Admission([Sequence(0, 50, 900)], 50))
    assert policy.grow(0, 850)
    mapped = [a.group for a in policy.drain()]
    assert (mapped.count(0), mapped.count(1)) == (15, 2)
    assert policy.usage().live == (900 + 100) * PAIR // TOKENS
    policy.check_integrity()


@pytest.mark.parametrize(
    ("spoil", "sum_that_fails"),
    [
        (lambda p: p._rows.live[0].page_groups[0].pop(), "page-groups in rows"),
        (lambda p: p._rows.live[0].page_groups[0].append(0), "page-groups by row"),
        (lambda p: setattr(p._rows, "free", p._rows.free - 2), "mapped [+] free"),
        (lambda p: setattr(p._rows.live[0], "length", 700), "holds its 700 tokens"),
        (lambda p: setattr(p._rows, "live_bytes", p._rows.live_bytes + 1), "live to retained"),
        (lambda p: setattr(p._books, "pool_bytes", p.pool_bytes - 1), "leaves are none or more"),
    ],
)
def test_spoilt_books_are_found(spoil, sum_that_fails):
    policy = policy_of()
    admit(policy, 0, 2)
    policy.check_integrity()
    spoil(policy)
    with pytest.raises(IntegrityError, match=sum_that_fails):
        policy.check_integrity()


# ---- configuration ---------------------------------------------------------------------------------------------


def test_the_registry_makes_it_from_its_config():
    assert config_class("vattention") is VAttentionConfig
    policy = make_policy(VAttentionConfig(page_group="128KB", overlap=False), LAYOUT, 100 * PAIR, 500)
    assert isinstance(policy, VAttentionPolicy)
    assert (policy.page_group_bytes, policy.overlap, policy.max_tokens) == (128 * KB, False, 500)
    assert policy.virtual_bytes == 256 * 2 * 512 * KB  # rows of 500 KB, rounded up to page-groups


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"page_group": "1MB"}, r"allocator\.page_group=1MB"),
        ({"watermark": 1.0}, r"allocator\.watermark: 1\.0 is not in \[0, 1\)"),
        ({"reclaim_threshold": -0.1}, r"allocator\.reclaim_threshold"),
        ({"max_rows": 0}, r"allocator\.max_rows: 0"),
        ({"eager_groups": 0}, r"allocator\.eager_groups: 0"),
        ({"page_group": "2MB"}, r"does not hold one page-group of 2MB in each of 2 tensors"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        policy_of(**options)
