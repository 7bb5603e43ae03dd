"""Rows of reserved memory, also where they overlap."""

import pytest
import torch

from kvarena.allocators.kv_layout import attention_layout
from kvarena.allocators.memory.model_shape import ModelShape
from kvarena.allocators.policy import Admission, CopyBlock, Map, Sequence
from kvarena.allocators.reservation.contiguous import ContiguousConfig, ContiguousPolicy
from kvarena.allocators.reservation.orca import OrcaConfig, OrcaPolicy
from kvarena.allocators.reservation.static import StaticConfig, StaticPolicy
from kvarena.allocators.reservation.store import ReservedStore
from kvarena.allocators.sizes import KB

LAYERS, HEADS, SIZE = 2, 1, 32  # float32: 128 bytes of K, and of V
LAYOUT = attention_layout(LAYERS, HEADS, SIZE, "float32")


def store_of(policy) -> ReservedStore:
    return ReservedStore(policy, ModelShape(LAYERS, HEADS, SIZE, torch.float32))


def test_static_rows_lie_side_by_side():
    policy = StaticPolicy(StaticConfig(), LAYOUT, 64 * KB, max_tokens=40)
    store = store_of(policy)
    k = store.layer(1).k
    assert k.shape == (64 * KB // LAYOUT.token_bytes // 40, 40, HEADS, SIZE)
    assert k.is_contiguous()
    store.close()


def test_rows_of_a_buddy_allocator_begin_at_any_block():
    policy = OrcaPolicy(OrcaConfig(estimate="oracle", block_size=16), LAYOUT, 64 * KB, max_tokens=64)
    store = store_of(policy)
    k = store.layer(0).k
    assert k.shape == (8, 64, HEADS, SIZE)
    assert k.stride() == (16 * SIZE, SIZE, SIZE, 1)
    assert policy.admit(Admission([Sequence(0, 10, 4)], 10)) is not None
    assert policy.admit(Admission([Sequence(1, 20, 12)], 20)) is not None
    k[policy.row(0), :10], k[policy.row(1), :32] = 1, 2
    assert k[policy.row(0), :10].eq(1).all()
    low, high = sorted((policy.row(0), policy.row(1)))
    assert low < high
    assert k[low, 16 * (high - low)].data_ptr() == k[high, 0].data_ptr()
    store.close()


def test_the_last_row_ends_within_the_pool_where_its_sequence_does():
    """A row is `max_tokens` long wherever it begins; the addresses past the pool are reserved and never touched."""
    policy = ContiguousPolicy(ContiguousConfig(estimate="oracle"), LAYOUT, 64 * KB, max_tokens=60)
    store = store_of(policy)
    tokens = 64 * KB // LAYOUT.token_bytes
    last = store.layer(LAYERS - 1).v
    assert last.shape == (tokens, 60, HEADS, SIZE)
    last[tokens - 1, 0] = 3
    assert last[tokens - 6, 5].eq(3).all()
    assert store.physical() == (64 * KB, 0, 64 * KB)
    store.close()


@pytest.mark.parametrize("action", [Map(0, 0, 0, 0), CopyBlock(0, 1)])
def test_only_rows_are_copied(action):
    store = store_of(StaticPolicy(StaticConfig(), LAYOUT, 64 * KB, max_tokens=40))
    with pytest.raises(ValueError, match="is not a copy of a row"):
        store.apply([action])
    assert store.driver_calls() == (0, 0.0, 0, 0.0, 0.0)
    store.close()
