import os

import pytest

from kvarena.allocators.sizes import MB
from kvarena.allocators.vmm import fragments
from kvarena.allocators.vmm.fragments import scattered_bytes, scattered_pages_held

PAGE = os.sysconf("SC_PAGE_SIZE")
BUDDYINFO = """\
Node 0, zone      DMA      1      0      0      0      2      1      1      0      1      1      3
Node 0, zone   Normal    100     50     10      3      5      7   2061    943    739    147     70
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine whose free lists are BUDDYINFO, with 8 MB available."""
    path = tmp_path / "buddyinfo"
    path.write_text(BUDDYINFO)
    monkeypatch.setattr(fragments, "_BUDDYINFO", path)
    monkeypatch.setattr(fragments, "available_bytes", lambda: 8 * MB)
    return path


def memfds() -> list[os.stat_result]:
    fds = (os.path.join("/proc/self/fd", fd) for fd in os.listdir("/proc/self/fd"))
    return [os.stat(fd) for fd in fds if os.path.exists(fd) and "kvarena-fragments" in os.readlink(fd)]


def test_blocks_of_less_than_64_pages_are_scattered(machine):
    assert scattered_bytes() == (1 + 100 + 50 * 2 + 10 * 4 + 3 * 8 + (2 + 5) * 16 + (1 + 7) * 32) * PAGE


def test_so_much_memory_is_held_meanwhile_and_no_longer(machine):
    with scattered_pages_held() as held:
        assert held == scattered_bytes()
        assert [status.st_blocks * 512 for status in memfds()] == [held]
    assert memfds() == []


def test_at_most_half_of_what_is_available_is_held(machine):
    machine.write_text(BUDDYINFO.replace("100", "99999"))
    with scattered_pages_held() as held:
        assert held == 4 * MB


def test_a_system_that_does_not_tell(machine):
    machine.unlink()
    with scattered_pages_held() as held:
        assert held == 0
        assert memfds() == []


def test_a_gpus_pools_are_not_made_of_them(machine):
    with scattered_pages_held("cuda") as held:
        assert (held, memfds()) == (0, [])


def test_memory_is_given_back_when_the_body_fails(machine):
    with pytest.raises(RuntimeError, match="body"), scattered_pages_held():
        raise RuntimeError("body")
    assert memfds() == []
