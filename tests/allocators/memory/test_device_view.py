"""What a store sends to a GPU every step; the CPU stands for the GPU."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvarena.allocators.memory.batch_view import make_view
from kvarena.allocators.memory.device_view import DeviceViews, view_maker
from kvarena.allocators.memory.staging import batches_of_blocks, indices_on
from kvarena.allocators.paged.batch_table import BlockTable, DeviceBlockTable
from kvarena.allocators.paged.swap_space import SwapSpace

CPU = torch.device("cpu")

sequences = st.lists(
    st.tuples(st.integers(1, 99), st.integers(1, 9), st.integers(0, 2**31 - 1)), min_size=1, max_size=400
)


def fields(view) -> tuple:
    """All of a view, comparable."""
    tensors = (view.lengths, view.query_starts, view.rows)
    small = [None if t is None else (t.dtype, t.tolist()) for t in tensors]
    return *small, view.max_length, view.max_queries, view.is_decode


@given(batches=st.lists(st.tuples(sequences, st.booleans(), st.booleans()), min_size=1, max_size=4))
def test_a_devices_view_says_what_a_hosts_says(batches):
    views = DeviceViews(CPU)
    for batch, decode, contiguous in batches:
        lengths, queries, rows = (list(column) for column in zip(*batch, strict=True))
        queries = [1] * len(batch) if decode else queries
        given_rows = rows if contiguous else None
        assert fields(views(lengths, queries, rows=given_rows)) == fields(make_view(lengths, queries, given_rows))


def test_addresses_never_change_unless_a_batch_is_larger_than_the_buffers():
    views = DeviceViews(CPU)

    def addresses(batch: int, queries: int = 1) -> list[int]:
        view = views([7] * batch, [queries] * batch, rows=list(range(batch)))
        return [t.data_ptr() for t in (view.lengths, view.query_starts, view.rows)]

    decode, prefill = addresses(3), addresses(3, queries=5)
    assert not set(decode) & set(prefill)
    for batch in (1, 256, 2):
        assert addresses(batch) == decode
        assert addresses(batch, queries=2) == prefill
    moved = addresses(257)
    assert moved != decode
    assert addresses(512) == addresses(1) == moved
    assert addresses(3, queries=5) == prefill


def test_a_decodes_view_outlives_a_prefills():
    views = DeviceViews(CPU)
    decode = views([5, 6], [1, 1], rows=[2, 4])
    before = fields(decode)
    views([9, 9, 9], [9, 9, 9], rows=[0, 1, 3])
    assert fields(decode) == before


def test_the_host_makes_its_views_anew():
    assert view_maker(CPU) is make_view


# ---- block tables ----------------------------------------------------------------------------------------------

tables = st.lists(
    st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=1, max_size=5), min_size=1, max_size=8
)


@given(batches=tables, rows=st.integers(1, 5), width=st.integers(1, 9))
def test_a_devices_table_holds_its_batch_whatever_came_before(batches, rows, width):
    table = DeviceBlockTable(CPU, rows, width)
    for batch in batches:
        tensor = table.update(batch)
        assert tensor.dtype == torch.int32
        assert tensor.shape == (len(batch), max(map(len, batch)))
        for row, blocks in zip(tensor.tolist(), batch, strict=True):
            assert row[: len(blocks)] == blocks


@pytest.mark.parametrize("larger", [[[3, 1], [7]], [[3, 1, 4, 1, 5]]])
def test_a_table_that_has_to_move_takes_its_batch_along(larger):
    table = DeviceBlockTable(CPU, 1, 4)
    first = table.update([[3, 1]])
    moved = table.update(larger)
    assert moved.data_ptr() != first.data_ptr()
    for row, blocks in zip(moved.tolist(), larger, strict=True):
        assert row[: len(blocks)] == blocks


def test_both_tables_notice_blocks_that_change_in_place():
    for table in (BlockTable(), DeviceBlockTable(CPU, 2, 8)):
        blocks = [3, 1, 4]
        table.update([blocks])
        blocks[-1] = 9
        assert table.update([blocks]).tolist() == [[3, 1, 9]]
        blocks.append(2)
        assert table.update([blocks]).tolist() == [[3, 1, 9, 2]]


def test_steady_decode_sends_only_new_blocks(monkeypatch):
    table = DeviceBlockTable(CPU, 4, 64)
    sent = []
    send = table._send
    monkeypatch.setattr(table, "_send", lambda changes: (sent.append(changes), send(changes)))
    blocks = [list(range(40)), list(range(50, 60))]
    table.update(blocks)
    address = table.update(blocks).data_ptr()
    blocks[1] += [60, 61]
    assert table.update(blocks)[1, :12].tolist() == blocks[1]
    assert [[(row, first, len(new)) for row, first, new in changes] for changes in sent] == [
        [(0, 0, 40), (1, 0, 10)],
        [(1, 10, 2)],
    ]
    assert table.update([*blocks, [7]]).data_ptr() == address


# ---- copies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indices", [[], [5], [3, 1, 2**40]])
def test_indices(indices):
    sent = indices_on(CPU, indices)
    assert (sent.dtype, sent.tolist()) == (torch.int64, indices)


@pytest.mark.parametrize(("block_bytes", "sizes"), [(480, [2, 2, 1]), (2000, [1] * 5), (100, [5])])
def test_batches_of_blocks_are_bounded_and_take_every_block_once(monkeypatch, block_bytes, sizes):
    monkeypatch.setattr("kvarena.allocators.memory.staging._BATCH_BYTES", 1000)
    blocks = torch.empty(9, block_bytes, dtype=torch.uint8)
    taken = [list(range(5))[part] for part in batches_of_blocks(blocks, 5)]
    assert [block for part in taken for block in part] == list(range(5))
    assert [len(part) for part in taken] == sizes


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("batch_bytes", [1, 3000, 1 << 20])
def test_blocks_go_to_the_cpu_pool_and_come_back_elsewhere(monkeypatch, on_gpu, batch_bytes):
    monkeypatch.setattr("kvarena.allocators.memory.staging._BATCH_BYTES", batch_bytes)
    pool = torch.randn(4, 16, 2, 3, 5)  # [2 * layers, N, P, H, D]: 480 bytes a block
    before = pool.clone()
    space = SwapSpace(8, pool)
    space._on_gpu = on_gpu  # the same steps, without pinned memory
    space.swap_out([3, 0, 9, 15], [7, 2, 0, 4])
    pool[:, [3, 0, 9, 15]] = 0
    space.swap_in([7, 2, 0, 4], [1, 15, 3, 0])
    assert torch.equal(pool[:, [1, 15, 3, 0]], before[:, [3, 0, 9, 15]])
    others = [2, *range(4, 9), *range(10, 15)]
    assert torch.equal(pool[:, others], before[:, others])
    assert not pool[:, 9].any()
