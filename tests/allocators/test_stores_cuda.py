"""Stores over the CUDA driver: through the fake, whose memory is the host's, and on a GPU where there is one."""

from functools import partial

import pytest
import torch
from fake_cuda import FakeCuda, FakedCudaDriver
from hypothesis import settings
from test_stores import Churn, check, write

from kvarena.allocators.kv_layout import attention_layout
from kvarena.allocators.memory.model_shape import ModelShape
from kvarena.allocators.memory.store import Store
from kvarena.allocators.policy import Admission, CopyBlock, Map, Policy, Sequence, SwapIn, SwapOut, Unmap
from kvarena.allocators.registry import allocator_names, config_class, make_policy
from kvarena.allocators.sizes import GB, KB, MB
from kvarena.allocators.stores import make_store
from kvarena.allocators.vattention import kernel_fence
from kvarena.allocators.vattention.policy import VAttentionConfig, VAttentionPolicy
from kvarena.allocators.vattention.store import VirtualStore
from kvarena.allocators.vmm import drivers
from kvarena.allocators.vmm.driver import DriverError, OutOfPhysicalMemory

LAYERS, HEADS, SIZE = 2, 4, 64
MAX_TOKENS = 200
TENSORS = 2 * LAYERS
OPTIONS = {"paged": {"block_size": 4, "swap_bytes": MB}, "fastertransformer": {"max_padded_tokens": 200}}


def policy_of(name: str, pool_bytes: int, dtype: str = "float32", **options) -> Policy:
    layout = attention_layout(LAYERS, HEADS, SIZE, dtype)
    config = config_class(name)(name=name, **{**OPTIONS.get(name, {}), **options})
    return make_policy(config, layout, pool_bytes, MAX_TOKENS)


@pytest.fixture
def fake(monkeypatch):
    """Every store takes its memory from this fake GPU, of 64 KB granularity."""
    gpu = FakeCuda(granularity=64 * KB)
    for made in ("memory.resident_store.make_driver_of_one", "vattention.store.make_driver"):
        monkeypatch.setattr(f"kvarena.allocators.{made}", lambda device, size: FakedCudaDriver(size, gpu))
    monkeypatch.setattr("kvarena.allocators.memory.resident_store.granularity_of", lambda device: gpu.granularity)
    return gpu


def serve(policy: Policy, store: Store) -> None:
    """Sequences grow; every position keeps what was written to it."""
    ids = [
        seq_id
        for seq_id in range(3)
        if policy.admit(Admission([Sequence(seq_id, 20 + seq_id, 60)], 20 + seq_id)) is not None
    ]
    assert len(ids) > 1
    written = [0] * len(ids)
    for grow in (0, 1, 17):
        assert all(policy.grow(seq_id, grow) for seq_id in ids if grow)
        lengths = [policy.length(seq_id) for seq_id in ids]
        store.apply(policy.drain())
        view = store.view(ids, lengths, [1] * len(ids))
        store.apply_in_background(policy.look_ahead())
        write(store, view, ids, written)
        written = lengths
    check(store, store.view(ids, written, [1] * len(ids)), ids)
    physical = store.physical()
    assert physical.mapped_bytes + physical.pooled_bytes == physical.counted_bytes


@pytest.mark.parametrize("name", allocator_names())
def test_every_allocator_on_created_handles(fake, name):
    policy = policy_of(name, 4 * MB, **({"page_group": "64KB", "max_rows": 12} if name == "vattention" else {}))
    store = make_store(policy, LAYERS, HEADS, SIZE, "float32")
    assert fake.created_bytes == store.physical().counted_bytes == policy.pool_bytes
    mapped = policy.mapped_bytes if isinstance(policy, VAttentionPolicy) else policy.pool_bytes
    assert fake.mapped_bytes == store.physical().mapped_bytes == mapped
    serve(policy, store)
    assert fake.mapped_bytes == store.physical().mapped_bytes
    store.close()
    assert fake.nothing_left


@pytest.mark.parametrize("name", allocator_names())
def test_no_kernel_finds_what_new_memory_held(fake, name):
    """It would be weighed with 0 past a length, and 0 x NaN is NaN; the fake's new memory is NaN all over."""
    policy = policy_of(name, 4 * MB, **({"page_group": "64KB", "max_rows": 12} if name == "vattention" else {}))
    store = make_store(policy, LAYERS, HEADS, SIZE, "float32")
    assert policy.admit(Admission([Sequence(0, 20, 60)], 20)) is not None
    store.apply(policy.drain())
    for layer in range(LAYERS):
        cache, view = store.layer(layer), store.view([0], [20], [1])
        owners = view.rows if view.rows is not None else view.block_table[0].long()
        for x in (cache.k, cache.v):
            assert not x[:, :20][owners].any()
    store.close()


@pytest.mark.gpu
@pytest.mark.parametrize("name", allocator_names())
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_allocator_on_a_gpu(name, dtype):
    policy = policy_of(name, 64 * MB, dtype, **({"page_group": "2MB", "max_rows": 12} if name == "vattention" else {}))
    store = make_store(policy, LAYERS, HEADS, SIZE, dtype, "cuda")
    assert store.layer(0).k.device.type == "cuda"
    assert store.physical().counted_bytes == policy.pool_bytes
    serve(policy, store)
    store.close()


def test_a_pool_that_is_no_multiple_of_the_granularity_is_rounded_up(fake):
    policy = policy_of("paged", 100 * KB)
    store = make_store(policy, LAYERS, HEADS, SIZE, "float32")
    assert store.physical() == (128 * KB, 0, 128 * KB)
    store.close()
    assert fake.nothing_left


class ChurnOnTheFake(Churn):
    """The same random programs over the CUDA driver."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeCuda(granularity=64 * KB)
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(
            "kvarena.allocators.vattention.store.make_driver", lambda device, size: FakedCudaDriver(size, self.fake)
        )

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            self.patch.undo()
        assert self.fake.nothing_left


TestChurnOnTheFake = ChurnOnTheFake.TestCase
TestChurnOnTheFake.settings = settings(max_examples=10, stateful_step_count=20, deadline=None)


# ---- vAttention's calls ----------------------------------------------------------------------------------------


def virtual(fake: FakeCuda, page_groups: int = 16, **switches) -> tuple[VAttentionPolicy, VirtualStore]:
    config = VAttentionConfig(**{"max_rows": 6, "page_group": "64KB", "eager_allocation": False} | switches)
    layout = attention_layout(LAYERS, HEADS, SIZE, "float32")
    policy = VAttentionPolicy(config, layout, page_groups * TENSORS * 64 * KB, MAX_TOKENS)
    store = VirtualStore(policy, ModelShape(LAYERS, HEADS, SIZE, torch.float32), FakedCudaDriver(64 * KB, fake))
    fake.calls.clear()
    return policy, store


def test_a_prompt_is_one_access_call_per_tensor(fake):
    policy, store = virtual(fake)
    assert policy.admit(Admission([Sequence(0, 150, 0)], 150)) is not None  # 1 KB a token: 3 page-groups in each tensor
    store.apply(policy.drain())
    assert fake.names == ["cuMemMap", "cuMemMap", "cuMemMap", "cuMemSetAccess"] * TENSORS
    assert store.driver_calls().critical == len(fake.calls)
    store.close()


def test_the_background_enters_the_context_and_maps_beside_the_step(fake):
    policy, store = virtual(fake, overlap=True)
    assert policy.admit(Admission([Sequence(0, 64, 60)], 64)) is not None  # full: the next token needs a page-group
    store.apply(policy.drain())
    fake.calls.clear()
    store.apply_in_background(policy.look_ahead())
    store.view([0], [64], [1])
    assert fake.names == ["cuCtxSetCurrent", *["cuMemMap", "cuMemSetAccess"] * TENSORS]
    assert store.driver_calls().background == 2 * TENSORS
    store.close()


@pytest.mark.parametrize("function", ["cuMemMap", "cuMemSetAccess"])
@pytest.mark.parametrize("after", range(TENSORS))
def test_a_page_group_is_mapped_in_every_tensor_or_in_none(fake, function, after):
    _, store = virtual(fake)
    before = fake.state
    fake.fail(function, after)
    with pytest.raises(DriverError, match=function):
        store.apply([Map(0, 0, 0, 0)])
    assert fake.state == before
    store.apply([Map(0, 0, 0, 0)])
    assert fake.mapped_bytes == TENSORS * 64 * KB
    store.close()
    assert fake.nothing_left


def test_what_was_mapped_and_unmapped_before_a_call_failed_is_undone(fake):
    actions = [Map(0, 1, 0, 1), Unmap(0, 0, 0, 0), Map(0, 2, 0, 0)]
    _, store = virtual(fake)
    store.apply([Map(0, 0, 0, 0)])
    before = fake.state
    for after in range((2 + 1 + 2) * TENSORS):
        fake.fail(after=after)
        with pytest.raises(DriverError):
            store.apply(actions)
        assert fake.state == before
    store.apply(actions)
    assert fake.mapped_bytes == 2 * TENSORS * 64 * KB
    store.close()
    assert fake.nothing_left


@pytest.mark.parametrize("name", ["static", "paged", "vattention"])
def test_a_pool_larger_than_the_gpu_leaves_nothing_behind(fake, name):
    fake.total_bytes = 3 * MB
    policy = policy_of(name, 4 * MB, **({"page_group": "64KB"} if name == "vattention" else {}))
    with pytest.raises(OutOfPhysicalMemory, match=r"create: .*CUDA_ERROR_OUT_OF_MEMORY.* of the GPU's 3MB is free"):
        make_store(policy, LAYERS, HEADS, SIZE, "float32")
    assert fake.nothing_left


# ---- kernels that may still read -------------------------------------------------------------------------------


class Kernels:
    """Stands for torch's events: which were recorded, and when they were waited for, among the driver's calls."""

    def __init__(self, fake: FakeCuda) -> None:
        self.fake = fake

    def so_far(self, device: str):
        self.fake.calls.append(("record",))
        return partial(self.fake.calls.append, ("wait",))


@pytest.fixture
def kernels(fake, monkeypatch):
    watched = Kernels(fake)
    monkeypatch.setattr("kvarena.allocators.vattention.store.kernels_so_far", watched.so_far)
    return watched


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("background", [False, True])
def test_unmapping_waits_for_the_kernels_launched_before_the_actions(fake, background):
    _, store = virtual(fake)
    perform = store.apply_in_background if background else store.apply
    store.apply([Map(0, 0, 0, 0)])
    fake.calls.clear()
    perform([Map(0, 1, 0, 1), Unmap(0, 0, 0, 0), Map(0, 2, 0, 0)])
    store.physical()
    names = [name for name in fake.names if name != "cuCtxSetCurrent"]
    maps = ["cuMemMap", "cuMemSetAccess"] * TENSORS
    assert names == ["record", *maps, "wait", *["cuMemUnmap"] * TENSORS, *maps]
    store.close()


@pytest.mark.usefixtures("kernels")
def test_mapping_waits_for_nobody(fake):
    _, store = virtual(fake)
    store.apply([])
    store.apply_in_background([])
    assert fake.calls == []
    store.apply([Map(0, 0, 0, 0)])
    assert "wait" not in fake.names
    store.close()


def test_kernels_of_a_cpu_have_run_when_they_return():
    assert kernel_fence.kernels_so_far("cpu")() is None


@pytest.mark.gpu
def test_a_fence_waits_for_what_was_launched_and_no_more():
    matrix = torch.randn(8192, 8192, device="cuda")
    done = torch.zeros(1, device="cuda")
    done += (matrix @ matrix).isfinite().all()
    wait = kernel_fence.kernels_so_far("cuda")
    event = torch.cuda.Event()
    for _ in range(20):
        matrix @ matrix
    event.record()
    wait()
    assert not event.query()  # later kernels still run
    torch.cuda.synchronize()
    assert done.item() == 1


# ---- copies on a GPU -------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_blocks_are_copied_and_swapped_on_a_gpu():
    policy = policy_of("paged", 64 * MB, block_size=16, swap_bytes=4 * MB)
    store = make_store(policy, LAYERS, HEADS, SIZE, "float32", "cuda")
    blocks = store._blocks
    blocks.copy_(torch.arange(blocks.numel(), device="cuda").reshape(blocks.shape) % 8191)
    before = blocks.clone()
    store.apply([CopyBlock(3, 10), CopyBlock(4, 11), SwapOut(5, 0), SwapOut(6, 2)])
    blocks[:, [5, 6]] = 0
    store.apply([SwapIn(2, 20), SwapIn(0, 21)])
    assert torch.equal(blocks[:, [10, 11, 20, 21]], before[:, [3, 4, 6, 5]])
    assert store._swapped._space.is_pinned()
    store.close()


@pytest.mark.gpu
def test_pools_of_a_gpu_are_the_gpus_bytes():
    free, _ = torch.cuda.mem_get_info()
    stores = [make_store(policy_of(name, GB), LAYERS, HEADS, SIZE, "float32", "cuda") for name in ("static", "paged")]
    left, _ = torch.cuda.mem_get_info()
    assert abs(free - left - 2 * GB) < 128 * MB
    for store in stores:
        store.close()


def test_no_driver_serves_other_devices():
    for call in (partial(drivers.make_driver, page_group_bytes=2 * MB), drivers.granularity_of):
        with pytest.raises(Exception, match=r"device=xpu.*cpu.*cuda"):
            call("xpu")
