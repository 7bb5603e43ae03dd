"""No key is without effect, and no key changes a number that keeps a published name: every experiment, every key.

What is asked of each stands in `every_key.py`. The experiments are shared out over two processes, since there are some
thousand tiny runs.
"""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor

import pytest
from every_key import BY_CLOCK, unread_keys, void_keys

ASKED = {"modelled": void_keys, "measured": unread_keys}
PAIRS = [(clock, experiment) for clock in ASKED for experiment in BY_CLOCK[clock]]


Faults = dict[tuple[str, str], Future[list[str]]]


@pytest.fixture(scope="module")
def faults(request: pytest.FixtureRequest) -> Iterator[Faults]:
    """Of every experiment that this session tests, the keys that are at fault."""
    tests = [item.callspec.params for item in request.session.items if item.path == request.path]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        yield {(t["clock"], t["experiment"]): pool.submit(ASKED[t["clock"]], t["experiment"]) for t in tests}


@pytest.mark.parametrize(("clock", "experiment"), PAIRS)
def test_no_key_is_without_effect(clock: str, experiment: str, faults: Faults) -> None:
    assert not faults[clock, experiment].result()
