"""Policies that reserve: static rows, Orca's buddy chunks, exact chunks, blocks; with the papers' numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvarena.allocators.kv_layout import attention_layout, sliding_layout
from kvarena.allocators.policy import Admission, IntegrityError, Sequence
from kvarena.allocators.reservation.contiguous import ContiguousConfig, ContiguousPolicy
from kvarena.allocators.reservation.estimate import estimator
from kvarena.allocators.reservation.orca import OrcaConfig, OrcaPolicy
from kvarena.allocators.reservation.paged_reserved import PagedReservedConfig, PagedReservedPolicy
from kvarena.allocators.reservation.static import StaticConfig, StaticPolicy
from kvarena.allocators.usage import paper_rollup
from kvarena.errors import UserError

OPT_13B = attention_layout(40, 40, 128)  # 800 KiB a token
TOKEN = OPT_13B.token_bytes
POOL = 984 * 16 * TOKEN  # what PagedAttention's Fig 2 implies
LENGTHS = st.tuples(st.integers(1, 1024), st.integers(1, 1023))


def orca(estimate, pool_bytes=POOL, **options):
    return OrcaPolicy(OrcaConfig(estimate=estimate, **options), OPT_13B, pool_bytes, max_tokens=2048)


def fill(policy, lengths):
    """Admit in order until one is refused; returns that one, the head of the line."""
    for seq_id, (prompt, output) in enumerate(lengths):
        seq = Sequence(seq_id, prompt, output)
        if policy.admit(Admission([seq], prompt)) is None:
            return seq
    raise AssertionError("the pool never filled up")


@pytest.mark.parametrize(("limit", "prompt", "output", "never_used"), [(2048, 7, 3, 2038), (512, 3, 2, 507)])
def test_slots_never_used_of_fig_3(limit, prompt, output, never_used):
    policy = StaticPolicy(StaticConfig(), OPT_13B, limit * TOKEN, max_tokens=limit)
    assert policy.admit(Admission([Sequence(0, prompt, output)], prompt)) is not None
    usage = policy.usage()
    assert usage.live == prompt * TOKEN
    assert usage.reserved == output * TOKEN
    assert usage.over_estimate == never_used * TOKEN
    assert usage.free == usage.rounding == 0


@given(st.lists(LENGTHS, min_size=8, max_size=8))
def test_orca_max_batches_7_whatever_the_dataset(lengths):
    """And its 88 last blocks, 8.943 % of the pool, never serve anyone: the external share of Fig 2."""
    policy = orca("max")
    head = fill(policy, lengths)
    assert head.seq_id == 7
    usage = policy.usage(head)
    assert (usage.free, usage.stranded) == (88 * 16 * TOKEN, 0)  # too few in sum, so not stranded
    external = paper_rollup(usage)["external_fragmentation_and_others"]
    assert external / POOL == 88 / 984
    assert round(100 * external / POOL, 3) == 8.943
    policy.check_integrity()


@pytest.mark.parametrize(
    ("estimate", "prompt", "output", "tokens"),
    [
        ("max", 10, 5, 2048),
        ("pow2", 10, 25, 10 + 32),  # the paper's own example: 25 reserves 32
        ("pow2", 10, 32, 10 + 32),
        ("pow2", 10, 1, 10 + 1),
        ("pow2", 1500, 520, 2048),  # 1500 + 1024 is cut
        ("oracle", 10, 25, 35),
        ("oracle", 2000, 60, 2048),
    ],
)
def test_estimates(estimate, prompt, output, tokens):
    assert estimator(estimate, 2048)(Sequence(0, prompt, output)) == tokens


def test_an_estimate_and_a_power_of_two_waste_apart():
    """100 + 130 tokens under Pow2: 256 guessed, 356 promised, 23 blocks, a chunk of 32 blocks or 512 tokens."""
    policy = orca("pow2")
    policy.admit(Admission([Sequence(0, 100, 130)], 100))
    usage = policy.usage()
    assert usage.live == 100 * TOKEN
    assert usage.reserved == 130 * TOKEN
    assert usage.over_estimate == (356 - 230) * TOKEN
    assert usage.rounding == (512 - 356) * TOKEN
    assert policy.tokens_until_growth(0) == 412
    policy.grow(0, 130)
    assert policy.usage()[:5] == (230 * TOKEN, 0, 0, 126 * TOKEN, 156 * TOKEN)


def test_rows_of_orca_start_at_blocks_and_chunks_at_multiples_of_their_size():
    policy = orca("oracle")
    for seq_id, tokens in enumerate((2000, 100, 17, 300)):
        policy.admit(Admission([Sequence(seq_id, tokens - 1, 1)], tokens - 1))
    chunks = [128, 8, 2, 32]  # blocks
    assert all(policy.row(seq_id) % chunk == 0 for seq_id, chunk in enumerate(chunks))
    assert policy.row_tokens == 16


def test_stranded_is_what_would_suffice_in_another_shape():
    """Of 4 chunks of 16 blocks, two that are no buddies are free: 32 blocks in sum, but no chunk of 32."""
    policy = orca("oracle", 64 * 16 * TOKEN)
    for seq_id in range(4):
        policy.admit(Admission([Sequence(seq_id, 200, 56)], 200))
    for gone in [seq_id for seq_id in range(4) if policy.row(seq_id) in (16, 32)]:
        policy.release(gone)
    half = 32 * 16 * TOKEN
    assert policy.usage().free == half
    for tokens, stranded in [(256, 0), (257, half), (512, half), (513, 0)]:
        head = Sequence(9, tokens - 1, 1)
        assert policy.can_admit(Admission([head], tokens - 1)) == (tokens == 256)
        assert policy.usage(head).stranded == stranded
        assert policy.usage(head).free == half - stranded


def test_a_power_of_two_strands_as_well():
    """24 blocks are free, 16 + 8. A request of 17 blocks would fit but for the chunk of 32 that it is given."""
    policy = orca("oracle", 56 * 16 * TOKEN)
    policy.admit(Admission([Sequence(0, 500, 12)], 500))
    assert policy.usage(Sequence(9, 271, 1)).stranded == 24 * 16 * TOKEN
    assert policy.usage(Sequence(9, 384, 1)).stranded == 0  # 385 tokens do not fit 24 blocks in any shape


def test_contiguous_strands_and_blocks_do_not():
    """The same three requests, the middle one gone: 100 + 100 tokens are free, in two holes or in any blocks."""
    contiguous = ContiguousPolicy(ContiguousConfig(), OPT_13B, 400 * TOKEN, max_tokens=2048)
    blocks = PagedReservedPolicy(PagedReservedConfig(block_size=4), OPT_13B, 400 * TOKEN, max_tokens=2048)
    head = Sequence(9, 150, 50)
    for policy in (contiguous, blocks):
        for seq_id in range(3):
            policy.admit(Admission([Sequence(seq_id, 60, 40)], 60))
        policy.release(1)
        assert policy.usage().rounding == 0
    assert contiguous.usage(head).stranded == 200 * TOKEN
    assert contiguous.admit(Admission([head], 150)) is None
    assert blocks.usage(head).stranded == 0
    assert blocks.admit(Admission([head], 150)) is not None
    assert contiguous.row(2) == 200
    assert len(blocks.block_table(9)) == 50


def test_blocks_reserved_ahead_round_to_a_block():
    policy = PagedReservedPolicy(PagedReservedConfig(), OPT_13B, POOL, max_tokens=2048)
    policy.admit(Admission([Sequence(0, 10, 7)], 10))
    assert len(policy.block_table(0)) == 2
    assert policy.usage()[:5] == (10 * TOKEN, 0, 7 * TOKEN, 0, 15 * TOKEN)


def test_rows_of_static_come_back_last_in_first_out():
    policy = StaticPolicy(StaticConfig(), OPT_13B, POOL, max_tokens=2048)
    for seq_id in range(7):
        assert policy.admit(Admission([Sequence(seq_id, 5, 5)], 5)) is not None
    assert [policy.row(seq_id) for seq_id in range(7)] == list(range(7))
    assert policy.admit(Admission([Sequence(7, 5, 5)], 5)) is None
    policy.release(3)
    policy.release(5)
    policy.admit(Admission([Sequence(7, 5, 5)], 5))
    assert policy.row(7) == 5
    assert policy.usage().remainder == (984 * 16 - 7 * 2048) * TOKEN


def test_a_static_row_keeps_a_ring_for_a_window():
    layout = sliding_layout(1, 3, 64, 2, 16)  # 64 of 256 tokens in three of four layers
    full, ring = layout.groups[0].token_bytes * 2, layout.groups[1].token_bytes * 6
    row = 256 * full + 64 * ring
    policy = StaticPolicy(StaticConfig(), layout, 3 * row + 1, max_tokens=256)
    policy.admit(Admission([Sequence(0, 50, 100)], 50))
    assert policy.usage()[:5] == (50 * (full + ring), 0, 100 * full + 14 * ring, 106 * full, 0)
    policy.grow(0, 50)
    assert policy.usage()[:5] == (100 * full + 64 * ring, 0, 50 * full, 106 * full, 0)
    assert policy.usage()[7:9] == (2 * row, 1)
    policy.check_integrity()


def test_a_request_that_could_never_run():
    assert orca("max").refusal(Admission([Sequence(0, 2000, 49)], 0))  # longer than the context
    assert not orca("max").refusal(Admission([Sequence(0, 2000, 48)], 0))
    small = orca("oracle", 96 * 16 * TOKEN)  # carved into 64 + 32 blocks
    assert not small.refusal(Admission([Sequence(0, 1000, 24)], 0))
    assert small.refusal(Admission([Sequence(0, 1000, 25)], 0))  # 65 blocks: a chunk of 128
    assert not ContiguousPolicy(ContiguousConfig(), OPT_13B, 96 * 16 * TOKEN, max_tokens=2048).refusal(
        Admission([Sequence(0, 1000, 25)], 0)
    )


def test_a_reservation_ends_where_its_units_end():
    policy = ContiguousPolicy(ContiguousConfig(), OPT_13B, POOL, max_tokens=2048)
    policy.admit(Admission([Sequence(0, 10, 5)], 10))
    assert policy.tokens_until_growth(0) == 5
    assert not policy.grow(0, 6)
    assert policy.length(0) == 10
    assert policy.grow(0, 5)
    assert policy.admit(Admission([Sequence(1, 10, 5)], 16)) is None


@pytest.mark.parametrize(
    "policy", [orca("oracle"), ContiguousPolicy(ContiguousConfig(), OPT_13B, POOL, max_tokens=2048)]
)
def test_a_planted_double_free_is_found(policy):
    policy.admit(Admission([Sequence(0, 100, 20)], 100))
    policy.check_integrity()
    policy._arena.give(policy._places[0])
    with pytest.raises(IntegrityError, match="overlap"):
        policy.check_integrity()


def test_a_planted_miscount_is_found():
    policy = orca("oracle")
    policy.admit(Admission([Sequence(0, 100, 20)], 100))
    policy._books.extents[0].length += 1
    with pytest.raises(IntegrityError, match="live, reserved"):
        policy.check_integrity()


def test_callers_bugs_raise():
    policy = orca("oracle")
    policy.admit(Admission([Sequence(0, 4, 4)], 4))
    with pytest.raises(ValueError, match="sequence 0 is resident already"):
        policy.admit(Admission([Sequence(0, 4, 4)], 4))
    for absent in (policy.release, policy.grow, policy.length, policy.row, policy.tokens_until_growth):
        with pytest.raises(KeyError):
            absent(7)
    policy.check_integrity()


def test_bad_options():
    with pytest.raises(UserError, match=r"allocator\.estimate: 'mean' is none of max, pow2, oracle"):
        orca("mean")
    with pytest.raises(UserError, match=r"allocator\.block_size: 0"):
        orca("max", block_size=0)
    with pytest.raises(UserError, match=f"does not hold one unit of 2048 tokens, which takes {2048 * TOKEN} bytes"):
        StaticPolicy(StaticConfig(), OPT_13B, 2048 * TOKEN - 1, max_tokens=2048)
