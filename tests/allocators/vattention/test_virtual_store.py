"""vAttention's store: driver calls on and off the critical path, failures, and the shape of its tensors."""

import os
import threading

import pytest
import torch

from kvarena.allocators.kv_layout import attention_layout
from kvarena.allocators.memory.model_shape import ModelShape
from kvarena.allocators.policy import Admission, CopyBlock, CopyRow, Map, Sequence, Unmap
from kvarena.allocators.sizes import KB, MB
from kvarena.allocators.vattention import cores
from kvarena.allocators.vattention.policy import VAttentionConfig, VAttentionPolicy
from kvarena.allocators.vattention.store import VirtualStore
from kvarena.allocators.vmm import libc
from kvarena.allocators.vmm.driver import DriverError
from kvarena.allocators.vmm.host import HostDriver
from kvarena.allocators.vmm.mappings import MappingBudget, count_mappings
from kvarena.errors import UserError

LAYERS, HEADS, SIZE = 3, 2, 128  # float16: 512 bytes of K, and of V; 128 tokens fill 64 KB
TOKENS = 128
TENSORS = 2 * LAYERS


def make(page_groups: int = 16, driver: HostDriver | None = None, **switches) -> tuple[VAttentionPolicy, VirtualStore]:
    config = VAttentionConfig(**{"max_rows": 6, "page_group": "64KB"} | switches)
    layout = attention_layout(LAYERS, HEADS, SIZE)
    policy = VAttentionPolicy(config, layout, page_groups * TENSORS * 64 * KB, 1000)
    return policy, VirtualStore(policy, ModelShape(LAYERS, HEADS, SIZE, torch.float16), driver)


def step(policy: VAttentionPolicy, store: VirtualStore, ids: list[int]) -> None:
    """One decode step, as a serving loop takes it."""
    assert all(policy.grow(seq_id) for seq_id in ids)
    store.apply(policy.drain())
    store.apply_in_background(policy.look_ahead())
    store.view(ids, [policy.length(seq_id) for seq_id in ids], [1] * len(ids))


@pytest.mark.parametrize("overlap", [True, False])
def test_steady_decode_maps_nothing_on_the_critical_path_with_overlap(overlap):
    policy, store = make(overlap=overlap, eager_allocation=False)
    ids = [0, 1]
    for seq_id in ids:
        assert policy.admit(Admission([Sequence(seq_id, 100 + seq_id, 400)], 100 + seq_id)) is not None
    step(policy, store, ids)
    start = store.driver_calls()
    for _ in range(3 * TOKENS):
        step(policy, store, ids)
    end = store.driver_calls()
    growths = 2 * 3 * TENSORS
    critical, background = end.critical - start.critical, end.background - start.background
    assert (critical, background) == ((0, growths) if overlap else (growths, 0))
    assert (end.background_s > start.background_s) == overlap
    assert (end.critical_s > start.critical_s) != overlap
    store.close()


def test_a_prompt_is_one_call_per_tensor():
    policy, store = make(eager_allocation=False)
    policy.admit(Admission([Sequence(0, 5 * TOKENS, 0)], 5 * TOKENS))
    store.apply(policy.drain())
    assert store.driver_calls().critical == TENSORS
    assert store.driver.calls["map"].calls == TENSORS
    store.close()


def test_taking_back_a_run_is_one_call_per_tensor():
    _, store = make()
    store.apply([Map(0, 2, ordinal, 5 + ordinal) for ordinal in range(4)])
    before = store.driver.calls["map"].calls
    store.apply([Unmap(0, 2, 3, 8), Unmap(0, 2, 2, 7), Unmap(0, 2, 1, 6), Map(0, 3, 0, 6), Unmap(0, 2, 0, 5)])
    assert store.driver.calls["unmap"].calls == 2 * TENSORS
    assert store.driver.calls["map"].calls - before == TENSORS
    assert store.physical().mapped_bytes == TENSORS * 64 * KB
    store.close()


def test_creating_the_pool_is_no_driver_call_of_the_run():
    policy, store = make()
    assert store.driver_calls() == (0, 0.0, 0, 0.0, 0.0)
    assert store.physical() == (0, policy.pool_bytes, policy.pool_bytes)
    store.close()


def test_waiting_for_the_background_is_counted(monkeypatch):
    _, store = make(eager_allocation=False)
    release = threading.Event()
    mapped = store.driver.map_runs

    def slow(runs) -> None:
        assert release.wait(10)
        mapped(runs)

    monkeypatch.setattr(store.driver, "map_runs", slow)
    store.apply_in_background([Map(0, 0, 0, 0)])
    threading.Timer(0.05, release.set).start()
    assert store.physical().mapped_bytes == TENSORS * 64 * KB
    calls = store.driver_calls()
    assert (calls.critical, calls.background) == (0, TENSORS)
    assert calls.waited_s > 0
    store.close()


def test_no_row_is_copied_in_the_background():
    """There it would run beside the kernels that write what it copies."""
    _, store = make()
    with pytest.raises(AssertionError, match="in the kernels' stream"):
        store.apply_in_background([Map(0, 0, 0, 0), CopyRow(0, 0, 1, 0, 64)])
    store.close()


# ---- tensors ---------------------------------------------------------------------------------------------------


def test_a_row_begins_at_a_page_group():
    """1000 tokens of 512 bytes are 7.8 page-groups, so the next row begins after 8."""
    policy, store = make()
    k = store.layer(0).k
    assert k.shape == (6, 1000, HEADS, SIZE)
    assert [stride * 2 for stride in k.stride()] == [8 * 64 * KB, 512, 256, 2]
    assert policy.virtual_bytes == TENSORS * 6 * 8 * 64 * KB
    policy.admit(Admission([Sequence(0, 1000, 0)], 1000))
    store.apply(policy.drain())
    k[policy.row(0)] = 1
    assert k[policy.row(0)].sum(dtype=torch.float32) == 1000 * HEADS * SIZE
    store.close()


def test_sliced_layers_are_slices_of_one_tensor():
    policy, store = make(tensor_slicing=True)
    k_all, v_all = store.tensors
    assert k_all.shape == v_all.shape == (6, 1000, LAYERS, HEADS, SIZE)
    policy.admit(Admission([Sequence(0, 50, 0)], 50))
    store.apply(policy.drain())
    row = policy.row(0)
    for n in range(LAYERS):
        store.layer(n).k[row, 7] = n
        store.layer(n).v[row, 7] = -n
    assert k_all[row, 7, :, 0, 0].tolist() == [0, 1, 2]
    assert v_all[row, 7, :, 1, 5].tolist() == [0, -1, -2]
    assert store.driver.calls["map"].calls == 2
    store.close()


# ---- failures --------------------------------------------------------------------------------------------------


@pytest.fixture
def failing_fourth_map(monkeypatch):
    """Of the first batch of page-groups, the fourth mmap fails."""
    map_files = libc.map_files

    def fail(fd, runs) -> None:
        monkeypatch.setattr(libc, "map_files", map_files)
        map_files(fd, runs[:3])
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(libc, "map_files", fail)


@pytest.mark.usefixtures("failing_fourth_map")
def test_a_page_group_is_mapped_in_every_tensor_or_in_none():
    _, store = make()
    with pytest.raises(DriverError, match="Permission denied"):
        store.apply([Map(0, 0, 0, 0)])
    assert store.physical().mapped_bytes == 0
    store.apply([Map(0, 0, 0, 0)])
    assert store.physical().mapped_bytes == TENSORS * 64 * KB
    store.close()


@pytest.mark.usefixtures("failing_fourth_map")
def test_an_error_in_the_background_surfaces_at_the_next_wait_once():
    policy, store = make()
    assert policy.admit(Admission([Sequence(0, 10, 0)], 10)) is not None
    store.apply_in_background(policy.drain())
    with pytest.raises(DriverError, match="Permission denied"):
        store.view([0], [10], [1])
    assert store.physical().mapped_bytes == 0
    store.close()


@pytest.mark.usefixtures("failing_fourth_map")
def test_an_error_in_the_background_surfaces_before_more_is_sent_there():
    _, store = make()
    store.apply_in_background([Map(0, 0, 0, 0)])
    with pytest.raises(DriverError, match="Permission denied"):
        store.apply_in_background([Map(0, 1, 0, 1)])
    assert store.physical().mapped_bytes == 0
    store.close()


@pytest.mark.usefixtures("failing_fourth_map")
def test_closing_gives_everything_back_before_it_raises_what_nobody_has_heard():
    _, store = make()
    store.apply_in_background([Map(0, 0, 0, 0)])
    with pytest.raises(DriverError, match="Permission denied"):
        store.close()
    assert store.driver.closed
    store.close()


def test_the_limit_on_mappings_reaches_the_user():
    used = count_mappings()
    driver = HostDriver(64 * KB, MappingBudget(limit=used + 90, headroom=50))
    _, store = make(driver=driver)
    scattered = [Map(0, row, 0, 15 - 2 * row) for row in range(6)]
    with pytest.raises(UserError, match=r"vm\.max_map_count"):
        store.apply(
            [action for a in scattered for action in (a, Map(0, a.row, 1, a.page_group - 1), Map(0, a.row, 2, a.row))]
        )
    store.close()


@pytest.mark.parametrize(
    "actions",
    [[Map(0, 0, 0, 0), Map(0, 0, 0, 1)], [Unmap(0, 0, 0, 0)], [Map(0, 6, 0, 0)], [CopyBlock(0, 1)]],
)
def test_actions_that_no_policy_of_ours_says(actions):
    _, store = make()
    with pytest.raises(ValueError, match=r"mapped|outside|performs no"):
        store.apply(actions)
    store.close()


def test_a_store_that_cannot_be_made_leaves_nothing_behind(monkeypatch):
    drivers = []

    class Recorded(HostDriver):
        def __init__(self, *args) -> None:
            super().__init__(*args)
            drivers.append(self)

    monkeypatch.setattr("kvarena.allocators.vmm.drivers.HostDriver", Recorded)
    monkeypatch.setattr("kvarena.allocators.vmm.host.available_bytes", lambda: MB)
    with pytest.raises(UserError):
        make()
    assert drivers[0].closed


def test_the_background_keeps_off_the_core_that_it_works_for(monkeypatch):
    """However the scheduler places the two, the thread that maps may not run where the actions came from."""
    _, store = make(eager_allocation=False)
    here = min(os.sched_getaffinity(0))
    others = os.sched_getaffinity(0) - {here}
    monkeypatch.setattr(cores, "_getcpu", lambda: here)
    store.apply_in_background([Map(0, 0, 0, 0)])
    allowed = store._worker.submit(os.sched_getaffinity, 0).result()
    assert allowed == (others or {here})
    assert store.physical().mapped_bytes == TENSORS * 64 * KB
    store.close()
