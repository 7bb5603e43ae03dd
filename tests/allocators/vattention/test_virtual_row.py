import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvarena.allocators.vattention.page_groups import RowGeometry
from kvarena.allocators.vattention.reclamation import IdleRows
from kvarena.allocators.vattention.rows import Row


def rows_with(mapped: list[int]) -> list[Row]:
    return [Row(i, [[]], mapped=count) for i, count in enumerate(mapped)]


@given(mapped=st.lists(st.integers(0, 5), min_size=1, max_size=8), needed=st.integers(0, 6))
def test_idle_rows_against_a_search_of_all(mapped, needed):
    rows = rows_with(mapped)
    idle = IdleRows(rows)
    enough = [row for row in rows if row.mapped >= needed]
    best = min(enough, key=lambda row: row.mapped) if enough else max(rows, key=lambda row: row.mapped)
    assert idle.best_fit(needed) is best
    assert idle.fullest() is max(rows, key=lambda row: row.mapped)
    assert list(idle.least_full_first()) == sorted((r for r in rows if r.mapped), key=lambda r: (r.mapped, r.index))


@given(mapped=st.lists(st.integers(0, 3), min_size=1, max_size=8), data=st.data())
def test_rows_that_come_and_go_stay_in_order(mapped, data):
    rows = rows_with(mapped)
    idle = IdleRows(rows)
    for row in data.draw(st.permutations(rows)):
        idle.remove(row)
        assert row not in list(idle)
        row.mapped = data.draw(st.integers(0, 3))
        idle.add(row)
    assert list(idle) == sorted(rows, key=lambda row: (row.mapped, row.index))
    assert len(idle) == len(rows)


@pytest.mark.parametrize(
    ("length", "final", "page_groups", "capacity", "enough_until", "surplus"),
    [(0, 10, 0, 0, 0, 0), (5, 10, 1, 8, 8, 0), (8, 10, 2, 16, 8, 2), (9, 9, 4, 20, 16, 4), (30, 10, 4, 20, 20, 0)],
)
def test_what_follows_from_length_and_slabs(length, final, page_groups, capacity, enough_until, surplus):
    """Two tensors, 8 tokens a page-group, rows of 20 tokens."""
    geometry = RowGeometry(num_tensors=2, token_stride=8, page_group=64, window=None)
    row = Row(0, [list(range(page_groups))], mapped=2 * page_groups, length=length, final=final)
    row.measure([geometry], max_tokens=20)
    assert (row.capacity, row.enough_until, row.surplus) == (capacity, enough_until, surplus)
    end = max(length, final)
    assert row.marks.covered == 2 * min(8 * end, 64 * page_groups)
    assert row.marks.rounded == 2 * min(64 * -(-end // 8), 64 * page_groups)
