"""Every call of the driver that an operation makes fails once: what was done is undone, and at the end nothing is left.

Run by `test_cuda_shim.py`, over the shim. What fails is not only this project's: events, pinned memory and copies
across the bus are torch's calls, and an operation that meets their errors has to be undone as well.
"""

import gc
import random
from collections.abc import Callable
from typing import NamedTuple

import pytest
from shim import OUT_OF_MEMORY, UNKNOWN, Live
from torch_on_shim import CONTEXT, SHIM

from kvarena.allocators.actions import CopyBlock, CopyRow, Map, SwapIn, SwapOut, Unmap
from kvarena.allocators.kv_layout import attention_layout
from kvarena.allocators.memory.store import Store
from kvarena.allocators.registry import config_class, make_policy
from kvarena.allocators.sizes import KB, MB
from kvarena.allocators.stores import make_store
from kvarena.allocators.testing.sharing_programs import Programs
from kvarena.allocators.vmm.cuda import CudaDriver
from kvarena.allocators.vmm.driver import DriverError, MapRun
from kvarena.allocators.vmm.drivers import granularity_of
from kvarena.errors import UserError

pytestmark = pytest.mark.gpu  # chosen with the others

LAYERS, HEADS, SIZE, TOKENS = 2, 8, 64, 96  # 2 KB of K a token in a layer: 32 tokens fill a page-group
OPTIONS = {
    "paged": {"swap_bytes": MB},
    "vattention": {"page_group": "64KB", "max_rows": 6, "deferred_reclamation": False},
}


@pytest.fixture(autouse=True)
def small_page_groups():
    """Smaller than a GPU's: hundreds of stores are made."""
    SHIM.sizes(granularity=64 * KB)
    CONTEXT("cuCtxSynchronize")  # from here on torch's context is current in this thread
    gc.freeze()  # what is here already need not be looked through each time
    yield
    gc.unfreeze()
    SHIM.sizes()


def store_of(name: str) -> Store:
    config = config_class(name)(name=name, **OPTIONS.get(name, {}))
    policy = make_policy(config, attention_layout(LAYERS, HEADS, SIZE, "float32"), 4 * MB, TOKENS)
    return make_store(policy, LAYERS, HEADS, SIZE, "float32", "cuda")


def prepared(name: str, *actions: object) -> Callable[[], Store]:
    """A store of which these actions were performed."""

    def make() -> Store:
        store = store_of(name)
        store.apply(actions)
        return store

    return make


def beside_a_step(store: Store) -> None:
    store.apply_in_background([Map(0, 0, 0, 0), Map(0, 1, 0, 1)])
    store.physical()


MAPPED = [Map(0, 0, 0, 0), Map(0, 1, 0, 1)]
SHARED = [Map(0, 2, 0, 0), Map(0, 3, 0, 2), CopyRow(0, 1, 3, 64, 512), Unmap(0, 1, 0, 1)]


class Operation(NamedTuple):
    """What fails, and the store that it is done to."""

    prepare: Callable[[], Store]
    perform: Callable[[Store], object]


OPERATIONS = {
    "map": Operation(prepared("vattention"), lambda store: store.apply(MAPPED)),
    "map beside a step": Operation(prepared("vattention"), beside_a_step),
    "unmap": Operation(
        prepared("vattention", *MAPPED), lambda store: store.apply([Unmap(0, 1, 0, 1), Unmap(0, 0, 0, 0)])
    ),
    "share rows": Operation(prepared("vattention", *MAPPED), lambda store: store.apply(SHARED)),
    "share blocks": Operation(prepared("paged"), lambda store: store.apply([CopyBlock(1, 2), CopyBlock(2, 3)])),
    "swap": Operation(
        prepared("paged"), lambda store: store.apply([SwapOut(5, 0), SwapOut(6, 1), SwapIn(1, 7), SwapIn(0, 5)])
    ),
}


def settled() -> Live:
    gc.collect()
    return SHIM.live()


def calls_of(prepare: Callable[[], Store], perform: Callable[[Store], object]) -> int:
    store = prepare()
    before = SHIM.calls
    perform(store)
    made = SHIM.calls - before
    store.close()
    return made


def failing(perform: Callable[[], object], after: int, result: int) -> None:
    """Perform, with the call after `after` others failing, and being told of it."""
    SHIM.fail(after=after, result=result)
    told = False
    try:
        perform()
    except (DriverError, UserError):
        told = True
    finally:
        armed = not SHIM.failed
        SHIM.fail(result=0)
    assert told, (armed, after)
    assert not armed


def assert_books_are_the_drivers(driver: CudaDriver, start: Live) -> None:
    live = SHIM.live()
    assert live.reservations - start.reservations == len(driver._ranges)
    assert live.handles - start.handles == len(driver._handles)
    assert live.taken - start.taken == driver.counted_bytes() == driver.mapped_bytes + driver.pooled_bytes
    mapped = sum(len(addresses.handles) for addresses in driver._ranges.values())
    assert live.mappings - start.mappings == live.accessible - start.accessible == mapped


@pytest.mark.parametrize("result", [UNKNOWN, OUT_OF_MEMORY])
@pytest.mark.parametrize("name", OPERATIONS)
def test_whichever_call_fails_all_is_as_before_and_can_be_done_again(name, result):
    prepare, perform = OPERATIONS[name]
    start = settled()
    calls = calls_of(prepare, perform)
    assert calls > 0
    for after in range(calls):
        store = prepare()
        before = settled()
        failing(lambda store=store: perform(store), after, result)
        assert settled() == before
        assert_books_are_the_drivers(store.driver, start)
        perform(store)
        assert_books_are_the_drivers(store.driver, start)
        store.close()
        del store
        assert settled() == start


@pytest.mark.parametrize("result", [UNKNOWN, OUT_OF_MEMORY])
@pytest.mark.parametrize("name", ["static", "paged", "vattention"])
def test_whichever_call_fails_making_a_store_and_closing_one_leave_nothing(name, result):
    start = settled()
    before = SHIM.calls
    store = store_of(name)
    making = SHIM.calls - before
    store.close()
    del store
    for after in range(making):
        failing(lambda: store_of(name), after, result)
        assert settled() == start
    in_use = prepared(name, *(MAPPED if name == "vattention" else ()))
    for after in range(calls_of(in_use, lambda store: store.close())):
        store = in_use()
        failing(store.close, after, result)
        del store
        assert settled() == start


def life(driver: CudaDriver) -> None:
    size = driver.page_group_bytes
    base, handles = driver.reserve(8 * size), driver.create(4)
    driver.clear(handles[:2])
    driver.map(base, 0, handles[:2])
    driver.map_runs([MapRun(base, 3 * size, handles[1:3]), MapRun(base, 6 * size, handles[3:])])
    driver.unmap_runs([MapRun(base, 0, handles[:2]), MapRun(base, 3 * size, handles[1:3])])
    driver.unmap(base, 6 * size, 1)
    driver.release(handles)
    driver.free(base)


@pytest.mark.parametrize("result", [UNKNOWN, OUT_OF_MEMORY])
def test_whichever_call_fails_a_drivers_books_are_the_systems(result):
    start = settled()
    before = SHIM.calls
    driver = CudaDriver(64 * KB)
    life(driver)
    calls = SHIM.calls - before
    driver.close()
    made: list[CudaDriver] = []

    def live() -> None:
        made.append(CudaDriver(64 * KB))
        life(made[0])

    for after in range(calls):
        failing(live, after, result)
        while made:
            assert_books_are_the_drivers(made[0], start)
            life(made[0])
            made.pop().close()
        assert settled() == start


def test_asking_for_the_granularity_leaves_nothing_whichever_call_fails():
    start, before = settled(), SHIM.calls
    assert granularity_of("cuda") == 64 * KB
    for after in range(SHIM.calls - before):
        failing(lambda: granularity_of("cuda"), after, UNKNOWN)
        assert settled() == start


@pytest.mark.parametrize("name", ["paged", "vattention"])
def test_whichever_call_fails_while_groups_are_served_closing_leaves_nothing(name):
    """Groups share, are swapped, end: real policies say what is done. Where they are then, nobody takes up again."""

    def serve() -> None:
        store = store_of(name)
        try:
            Programs(store._policy, store, LAYERS).play(random.Random(2).randrange, 60)
        finally:
            store.close()

    start, before = settled(), SHIM.calls
    serve()
    calls = SHIM.calls - before
    for after in range(0, calls, 1 + calls // 16):
        failing(serve, after, UNKNOWN)
        assert settled() == start
