"""Block tables that follow the policy, and copies of blocks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvarena.allocators.kv_layout import attention_layout
from kvarena.allocators.memory.model_shape import ModelShape
from kvarena.allocators.paged.block_copies import batches
from kvarena.allocators.paged.policy import PagedConfig, PagedPolicy
from kvarena.allocators.paged.store import BlockTable, PagedStore
from kvarena.allocators.policy import Admission, CopyBlock, Map, Sequence, SwapIn, SwapOut
from kvarena.allocators.sizes import KB

LAYERS, HEADS, SIZE, BLOCK = 2, 2, 8, 4


def make(blocks: int = 32, cpu_blocks: int = 8) -> tuple[PagedPolicy, PagedStore]:
    layout = attention_layout(LAYERS, HEADS, SIZE, "float32")
    block_bytes = BLOCK * layout.token_bytes
    policy = PagedPolicy(
        PagedConfig(block_size=BLOCK, swap_bytes=cpu_blocks * block_bytes), layout, blocks * block_bytes, max_tokens=64
    )
    return policy, PagedStore(policy, ModelShape(LAYERS, HEADS, SIZE, torch.float32))


def fill(store: PagedStore) -> torch.Tensor:
    """Give every element of the pool a value of its own; returns a copy of K and V of all layers."""
    for n in range(LAYERS):
        for which, tensor in enumerate((store.layer(n).k, store.layer(n).v)):
            tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape) + (2 * n + which) * tensor.numel())
    return contents(store)


def contents(store: PagedStore) -> torch.Tensor:
    """[2 * layers, blocks, ...]."""
    return torch.stack([t.clone() for n in range(LAYERS) for t in (store.layer(n).k, store.layer(n).v)])


@given(
    batches=st.lists(
        st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=1, max_size=5), min_size=1, max_size=8
    )
)
def test_a_table_holds_its_batch_whatever_came_before(batches):
    table = BlockTable()
    tensors = [table.update(batch) for batch in batches]
    for batch, tensor in zip(batches, tensors, strict=True):  # earlier ones stay valid
        assert tensor.dtype == torch.int32
        assert tensor.shape == (len(batch), max(map(len, batch)))
        for row, blocks in zip(tensor.tolist(), batch, strict=True):
            assert row[: len(blocks)] == blocks


def test_a_table_notices_a_policy_that_changes_its_lists_in_place():
    table, blocks = BlockTable(), [3, 1, 4]
    table.update([blocks])
    blocks[-1] = 9
    assert table.update([blocks]).tolist() == [[3, 1, 9]]
    blocks.append(2)
    assert table.update([blocks]).tolist() == [[3, 1, 9, 2]]


def test_steady_decode_writes_only_new_blocks():
    policy, store = make()
    lengths = {0: 14, 1: 6, 2: 7}
    for seq_id, length in lengths.items():
        assert policy.admit(Admission([Sequence(seq_id, length, 20)], length)) is not None

    def table_of_next_step() -> list[list[int]]:
        assert all(policy.grow(seq_id) for seq_id in lengths)
        view = store.view(list(lengths), [policy.length(seq_id) for seq_id in lengths], [1] * 3)
        return view.block_table.tolist()

    table_of_next_step()
    store._decode_table._array[:] = -1  # so that what is written again shows
    assert table_of_next_step() == [[-1] * 4, [-1] * 4, [-1, -1, policy.block_table(2)[2], -1]]
    store.close()


def test_copies_move_a_block_in_every_layer():
    _, store = make()
    before = fill(store)
    store.apply([CopyBlock(3, 10), CopyBlock(4, 11)])
    after = contents(store)
    assert torch.equal(after[:, [10, 11]], before[:, [3, 4]])
    untouched = [b for b in range(32) if b not in (10, 11)]
    assert torch.equal(after[:, untouched], before[:, untouched])
    store.close()


actions_of = st.lists(
    st.one_of(
        st.builds(CopyBlock, st.integers(0, 7), st.integers(0, 7)),
        st.builds(SwapOut, st.integers(0, 7), st.integers(0, 7)),
        st.builds(SwapIn, st.integers(0, 7), st.integers(0, 7)),
    ),
    max_size=12,
)


@given(actions=actions_of)
def test_batches_do_what_one_after_the_other_does(actions):
    def play(steps) -> tuple[list[int], list[int]]:
        pool, swapped = list(range(8)), list(range(100, 108))
        for kind, sources, targets in steps:
            assert len(set(targets)) == len(targets)  # which of two would win?
            out_of, into = (swapped if kind is SwapIn else pool), (swapped if kind is SwapOut else pool)
            for target, value in zip(targets, [out_of[source] for source in sources], strict=True):
                into[target] = value
        return pool, swapped

    one_by_one = [(type(a), [a.source], [a.target]) for a in actions]
    assert play(batches(actions)) == play(one_by_one)


def test_independent_copies_are_one_batch():
    assert len(list(batches([CopyBlock(i, i + 10) for i in range(5)]))) == 1


def test_only_copies_can_be_batched():
    with pytest.raises(ValueError, match="Map is not a copy"):
        list(batches([Map(0, 0, 0, 0)]))


def test_a_sequence_comes_back_from_the_cpu_pool_as_it_went():
    policy, store = make()
    before = fill(store)
    assert policy.admit(Admission([Sequence(0, 10, 20)], 10)) is not None
    went = list(policy.block_table(0))
    policy.swapping.swap_out([0])
    assert policy.admit(Admission([Sequence(1, 12, 0)], 12)) is not None  # takes the same blocks
    store.apply(policy.drain())
    for n in range(LAYERS):
        store.layer(n).k[went] = 0
        store.layer(n).v[went] = 0
    policy.swapping.swap_in([0])
    store.apply(policy.drain())
    assert set(policy.block_table(0)).isdisjoint(policy.block_table(1))
    assert torch.equal(contents(store)[:, policy.block_table(0)], before[:, went])
    store.close()


def test_forks_copy_the_shared_last_block():
    policy, store = make()
    before = fill(store)
    assert policy.admit(Admission([Sequence(0, 6, 10)], 6)) is not None
    policy.sharing.fork(0, Sequence(1, 6, 10))
    assert policy.grow(1)
    assert store.view([0, 1], [6, 7], [1, 1]).block_table.tolist() == [policy.block_table(0), policy.block_table(1)]
    store.apply(policy.drain())
    assert torch.equal(contents(store)[:, policy.block_table(1)], before[:, policy.block_table(0)])
    store.close()


def test_a_pool_that_is_no_multiple_of_a_page_is_rounded_up():
    layout = attention_layout(1, 1, 8, "float32")
    policy = PagedPolicy(PagedConfig(block_size=BLOCK), layout, 5 * KB, max_tokens=64)
    store = PagedStore(policy, ModelShape(1, 1, 8, torch.float32))
    assert store.physical() == (8 * KB, 0, 8 * KB)
    store.close()
