"""PagedAttention's diagrams as test vectors, and the rules of its artifact."""

import pytest

from kvarena.allocators.kv_layout import attention_layout
from kvarena.allocators.paged.policy import PagedConfig, PagedPolicy
from kvarena.allocators.policy import Admission, CopyBlock, IntegrityError, Sequence, SwapIn, SwapOut
from kvarena.errors import UserError

LAYOUT = attention_layout(2, 4, 8)
TOKEN = LAYOUT.token_bytes


def paged(num_blocks=8, block_size=4, watermark=0.0, **options):
    pool = num_blocks * block_size * TOKEN
    return PagedPolicy(
        PagedConfig(block_size=block_size, watermark=watermark, **options), LAYOUT, pool, max_tokens=2048
    )


def test_block_table_translation_of_fig_6():
    """Prompt of 7 tokens, blocks of 4: logical blocks 0, 1, 2 come to lie in blocks 7, 1, 3."""
    policy = paged()
    for block in range(8):
        assert policy.admit(Admission([Sequence(block, 4, 1)], 4)) is not None
    for block in (3, 1, 7):  # the one freed last is taken first
        policy.release(block)
    assert policy.admit(Admission([Sequence(10, 7, 3)], 7)) is not None
    assert policy.block_table(10) == [7, 1]  # 4 and 3 tokens
    assert policy.grow(10)
    assert policy.block_table(10) == [7, 1]  # "brought" fills block 1
    assert policy.tokens_until_growth(10) == 0
    assert policy._tables.blocks_to_grow(10, 1) == 1
    assert policy.grow(10)
    assert policy.block_table(10) == [7, 1, 3]
    policy.check_integrity()


def test_copy_on_write_of_fig_8():
    """Two samples share a prompt of 7 tokens; the first to write copies the last block, the second writes in place."""
    policy = paged()
    policy.admit(Admission([Sequence(1, 7, 2)], 7))
    policy.sharing.fork(1, Sequence(2, 7, 2))
    shared = policy.block_table(1)
    assert policy.block_table(2) == shared == [0, 1]
    assert policy.free_units == 6
    assert policy.usage().live == 7 * TOKEN  # shared bytes once
    assert policy._tables.blocks_to_grow(1, 1) == 1
    policy.check_integrity()

    assert policy.grow(1)
    assert policy.drain() == [CopyBlock(source=1, target=2)]
    assert policy.block_table(1) == [0, 2]
    assert policy.usage().live == (4 + 3 + 4) * TOKEN
    policy.check_integrity()

    assert policy.grow(2)  # the reference count has gone from 2 to 1
    assert policy.drain() == []
    assert policy.block_table(2) == [0, 1]
    assert policy.usage().live == (4 + 4 + 4) * TOKEN
    policy.check_integrity()

    policy.release(1)
    assert policy.free_units == 6  # block 0 lives on
    policy.release(2)
    assert policy.free_units == 8


def test_samples_of_a_prompt_that_ends_with_a_block_copy_nothing():
    policy = paged()
    policy.admit(Admission([Sequence(0, 8, 4)], 8))
    for sample in (1, 2):
        policy.sharing.fork(0, Sequence(sample, 8, 4))
    assert all(policy.grow(sample) for sample in (0, 1, 2))
    assert policy.drain() == []
    assert policy.free_units == 8 - 2 - 3


@pytest.mark.parametrize("samples", [2, 3, 4])
def test_n_samples_make_n_minus_1_copies(samples):
    policy = paged()
    policy.admit(Admission([Sequence(0, 3, 4)], 3))
    for sample in range(1, samples):
        policy.sharing.fork(0, Sequence(sample, 3, 4))
    assert all(policy.grow(sample) for sample in range(samples))
    assert len(policy.drain()) == samples - 1
    policy.check_integrity()


def test_copy_on_write_without_a_free_block_changes_nothing():
    policy = paged(num_blocks=1)
    policy.admit(Admission([Sequence(0, 2, 2)], 2))
    policy.sharing.fork(0, Sequence(1, 2, 2))
    assert not policy.grow(0)
    assert policy.block_table(0) == policy.block_table(1) == [0]
    assert policy.drain() == []
    policy.release(1)
    assert policy.grow(0)  # alone again, in place


def test_a_copy_for_a_sequence_that_has_gone_is_not_made():
    policy = paged()
    policy.admit(Admission([Sequence(0, 3, 4)], 3))
    policy.sharing.fork(0, Sequence(1, 3, 4))
    policy.grow(0)
    policy.release(0)
    assert policy.drain() == []
    policy.check_integrity()


def test_a_copy_whose_target_a_fork_still_reads_is_made():
    policy = paged()
    policy.admit(Admission([Sequence(0, 2, 4)], 2))
    policy.sharing.fork(0, Sequence(1, 2, 4))
    policy.grow(0)
    policy.sharing.fork(0, Sequence(2, 3, 4))
    policy.release(0)
    assert policy.drain() == [CopyBlock(0, 1)]


def test_empty_slots_of_a_shared_block_are_reserved_while_anyone_will_write_them():
    policy = paged(block_size=8)
    policy.admit(Admission([Sequence(0, 2, 2)], 2))  # ends at 4 of 8
    assert policy.usage()[2:5] == (2 * TOKEN, 0, 4 * TOKEN)  # reserved, over_estimate, rounding
    policy.sharing.fork(0, Sequence(1, 2, 4))  # ends at 6
    assert policy.usage()[2:5] == (4 * TOKEN, 0, 2 * TOKEN)
    policy.release(1)
    assert policy.usage()[2:5] == (2 * TOKEN, 0, 4 * TOKEN)


def test_the_watermark_binds_admission_but_not_growth():
    policy = paged(num_blocks=200, watermark=0.01)  # 2 blocks
    assert policy.watermark_blocks == 2
    assert not policy.can_admit(Admission([Sequence(0, 199 * 4, 4)], 199 * 4))
    assert policy.admit(Admission([Sequence(0, 198 * 4, 8)], 198 * 4)) is not None
    assert not policy.can_admit(Admission([Sequence(1, 1, 1)], 1))
    assert policy.grow(0, 8)
    assert policy.free_units == 0
    assert policy.usage().free == 0
    assert not policy.grow(0)


def test_watermark_of_opt_13b():
    policy = PagedPolicy(PagedConfig(), attention_layout(40, 40, 128), 984 * 12_800 * 1024, max_tokens=2048)
    assert (policy.num_blocks, policy.watermark_blocks) == (984, 9)


@pytest.mark.parametrize(("watermark", "most"), [(0.0, 7 * 4 + 1), (0.25, 5 * 4 + 1)])
def test_the_longest_sequence_leaves_a_block_before_its_last_token(watermark, most):
    """Alone in 8 blocks, it must never be refused the free block that vLLM asks for before it appends."""
    policy = paged(watermark=watermark)
    assert not policy.refusal(Admission([Sequence(0, most - 1, 1)], 0))
    assert policy.refusal(Admission([Sequence(0, most, 1)], 0))
    assert policy.admit(Admission([Sequence(0, most - 1, 1)], most - 1)) is not None
    assert policy.free_units - policy.watermark_blocks == 1


def test_swapping_moves_a_sequence_and_brings_it_back():
    policy = paged(swap_bytes=3 * 4 * TOKEN)
    policy.admit(Admission([Sequence(0, 9, 5)], 9))
    policy.admit(Admission([Sequence(1, 4, 4)], 4))
    assert policy.swapping.can_swap_out([0])
    policy.swapping.swap_out([0])
    assert policy.drain() == [SwapOut(0, 0), SwapOut(1, 1), SwapOut(2, 2)]
    assert policy.usage().live == 4 * TOKEN
    assert policy.swapping.slots() == (9, 3, 0, 0)
    assert not policy.swapping.can_swap_out([1])  # the CPU pool is full
    with pytest.raises(ValueError, match="swapped out"):
        policy.admit(Admission([Sequence(0, 9, 5)], 9))
    policy.check_integrity()
    policy.admit(Admission([Sequence(2, 12, 4)], 12))
    assert policy.swapping.can_swap_in([0])  # 4 blocks are free: its 3 and one to grow into
    policy.grow(1)
    assert not policy.swapping.can_swap_in([0])
    policy.release(2)
    policy.swapping.swap_in([0])
    assert [type(action) for action in policy.drain()] == [SwapIn] * 3
    assert policy.swapping.slots() == (0, 0, 0, 12)
    assert policy.length(0) == 9
    assert policy.swapping.can_swap_out([1])
    policy.check_integrity()


def test_a_copy_precedes_the_swap_that_reads_it():
    policy = paged(swap_bytes=8 * 4 * TOKEN)
    policy.admit(Admission([Sequence(0, 3, 4)], 3))
    policy.sharing.fork(0, Sequence(1, 3, 4))
    policy.grow(0)
    policy.swapping.swap_out([0])
    assert policy.drain() == [CopyBlock(0, 1), SwapOut(1, 0)]


def test_a_swapped_sequence_may_be_given_up():
    policy = paged(swap_bytes=2 * 4 * TOKEN)
    policy.admit(Admission([Sequence(0, 8, 1)], 8))
    policy.swapping.swap_out([0])
    policy.release(0)
    policy.admit(Admission([Sequence(0, 8, 1)], 8))
    assert policy.swapping.can_swap_out([0])


def test_without_a_cpu_pool_nothing_swaps():
    assert paged().swapping is None
    assert paged(swap_bytes=4 * TOKEN - 1).swapping is None  # less than a block


def test_growing_by_many_tokens_is_growing_often():
    at_once, one_by_one = paged(num_blocks=64), paged(num_blocks=64)
    for policy in (at_once, one_by_one):
        policy.admit(Admission([Sequence(0, 5, 100)], 5))
    at_once.grow(0, 90)
    for _ in range(90):
        one_by_one.grow(0)
    assert at_once.usage() == one_by_one.usage()
    assert at_once.block_table(0) == one_by_one.block_table(0)


def test_quiet_steps_end_before_the_last_free_block():
    policy = paged(num_blocks=8)
    policy.admit(Admission([Sequence(0, 3, 50)], 3))
    policy.admit(Admission([Sequence(1, 1, 50)], 1))
    # 5 of the 6 free blocks: sequence 0 takes one in steps 2, 6, 10, ..., sequence 1 in steps 4, 8, 12, ...
    assert policy.quiet_steps([0, 1], 40) == 11
    assert policy.quiet_steps([0, 1], 7) == 7
    policy.advance([0, 1], 11)
    assert policy.free_units == 1
    assert policy.quiet_steps([0, 1], 40) == 0


def test_a_planted_double_free_is_found():
    policy = paged()
    policy.admit(Admission([Sequence(0, 9, 3)], 9))
    policy.check_integrity()
    policy._pool.drop([policy.block_table(0)[1]])
    with pytest.raises(IntegrityError, match="unit 1 2 times"):
        policy.check_integrity()


def test_a_planted_miscount_is_found():
    policy = paged()
    policy.admit(Admission([Sequence(0, 9, 3)], 9))
    policy._tables._live += 1
    with pytest.raises(IntegrityError, match="10 kept, 9 recounted"):
        policy.check_integrity()


def test_callers_bugs_raise():
    policy = paged()
    policy.admit(Admission([Sequence(0, 4, 4)], 4))
    for again in (
        lambda: policy.admit(Admission([Sequence(0, 4, 4)], 4)),
        lambda: policy.sharing.fork(0, Sequence(0, 4, 4)),
    ):
        with pytest.raises(ValueError, match="sequence 0 is resident already"):
            again()
    for absent in (policy.release, policy.grow, policy.length, policy.block_table, policy.tokens_until_growth):
        with pytest.raises(KeyError):
            absent(7)
    policy.check_integrity()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, r"allocator.block_size: 0 is not in 1 \.\. 256"),
        ({"block_size": 257}, r"allocator.block_size: 257"),
        ({"watermark": 1.0}, r"allocator.watermark: 1.0 is not in \[0, 1\)"),
        ({"watermark": -0.1}, "allocator.watermark"),
        ({"swap_bytes": "20 parsecs"}, "allocator.swap_bytes"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        PagedPolicy(PagedConfig(**options), LAYOUT, 1 << 20, max_tokens=64)


def test_a_pool_smaller_than_a_block():
    with pytest.raises(UserError, match=f"pool of 100 bytes does not hold one block of 16 tokens.* {16 * TOKEN} bytes"):
        PagedPolicy(PagedConfig(), LAYOUT, 100, max_tokens=64)


@pytest.mark.parametrize("block_size", [1, 3, 256])
def test_any_block_size_up_to_256(block_size):
    policy = PagedPolicy(PagedConfig(block_size=block_size, watermark=0), LAYOUT, 1024 * TOKEN, max_tokens=512)
    assert policy.num_blocks == 1024 // block_size
    policy.admit(Admission([Sequence(0, 300, 100)], 300))
    policy.grow(0, 100)
    assert len(policy.block_table(0)) == -(-400 // block_size)
    policy.check_integrity()
