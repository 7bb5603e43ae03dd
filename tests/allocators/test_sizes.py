import pytest

from kvarena.allocators.sizes import format_bytes, parse_bytes, round_up
from kvarena.errors import UserError


@pytest.mark.parametrize(
    ("size", "num_bytes"),
    [
        (0, 0),
        (4096, 4096),
        ("65536", 65536),
        ("64KB", 65536),
        (" 64 kb ", 65536),
        ("2MiB", 2 << 20),
        ("1.5GB", 3 << 29),
    ],
)
def test_sizes_as_people_write_them(size, num_bytes):
    assert parse_bytes(size) == num_bytes


@pytest.mark.parametrize("size", ["", "MB", "2 TB", "-1", "1e3", "two", -1, True, None, 1.5, "0.3KB"])
def test_what_is_not_a_size_is_refused_by_the_name_of_its_setting(size):
    with pytest.raises(UserError, match=r"allocator\.page_group="):
        parse_bytes(size, "allocator.page_group")


@pytest.mark.parametrize("num_bytes", [1, 1023, 64 << 10, 2 << 20, 3 << 30])
def test_whole_sizes_survive_the_way_out_and_in(num_bytes):
    assert parse_bytes(format_bytes(num_bytes).replace("bytes", "")) == num_bytes


def test_other_sizes_are_rounded_for_reading():
    assert format_bytes(1300) == "1.27 KB"


def test_round_up():
    assert [round_up(n, 8) for n in (0, 1, 8, 9)] == [0, 8, 8, 16]
