"""The timed tier's suite: what a request, a step and a driver call cost on the host.

It runs in two trees, always this tree's text: on the head's package and on the base's. So it imports nothing of the
gate, and no more of the package than each benchmark needs, inside it: a base that lacks something fails that one alone.

A benchmark makes its state and returns what is timed: a millisecond or a few on one thread, the same work at every
call. Shorter than a time slice, so that of several runs one is likely not to be interrupted.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvarena.allocators.memory.store import Store
    from kvarena.allocators.policy import Policy
    from kvarena.kernels.view import BatchView

Body = Callable[[], object]

BLOCK = 16  # tokens


def paged_block_by_block() -> Body:
    """PagedPolicy: 32 blocks taken one by one and freed, reference counts included."""
    from kvarena.allocators.kv_layout import attention_layout
    from kvarena.allocators.paged.policy import PagedConfig, PagedPolicy
    from kvarena.allocators.policy import Admission, Sequence

    layout = attention_layout(num_layers=40, num_kv_heads=40, head_size=128)
    policy = PagedPolicy(PagedConfig(), layout, 984 * BLOCK * layout.token_bytes, max_tokens=2048)
    seq = Sequence(0, BLOCK, 31 * BLOCK)

    def body() -> None:
        for _ in range(30):
            policy.admit(Admission([seq], BLOCK))
            for _ in range(31):
                policy.grow(0, BLOCK)
            policy.release(0)

    return body


def paged_batch_step() -> Body:
    """PagedPolicy: 64 steps of 48 sequences, one token each, with the leaves of every step."""
    from kvarena.allocators.kv_layout import attention_layout
    from kvarena.allocators.paged.policy import PagedConfig, PagedPolicy

    layout = attention_layout(num_layers=40, num_kv_heads=40, head_size=128)
    policy = PagedPolicy(PagedConfig(), layout, 984 * BLOCK * layout.token_bytes, max_tokens=2048)
    return _decode_steps(policy, batch=48, steps=64)


def vattention_batch_step() -> Body:
    """VAttentionPolicy: 64 steps of 32 sequences, page-groups mapped ahead as they grow."""
    from kvarena.allocators.kv_layout import attention_layout
    from kvarena.allocators.vattention.policy import VAttentionConfig, VAttentionPolicy

    layout = attention_layout(num_layers=32, num_kv_heads=4, head_size=128)
    policy = VAttentionPolicy(VAttentionConfig(max_rows=64, page_group="64KB"), layout, 4 << 30, max_tokens=4096)
    return _decode_steps(policy, batch=32, steps=64)


def _decode_steps(policy: "Policy", batch: int, steps: int) -> Body:
    from kvarena.allocators.policy import Admission, Sequence

    seqs = [Sequence(i, 100 + 3 * i, steps) for i in range(batch)]
    ids = [seq.seq_id for seq in seqs]

    def body() -> None:
        for seq in seqs:
            assert policy.admit(Admission([seq], seq.prompt_tokens)) is not None
        policy.drain()
        policy.look_ahead()
        for _ in range(steps):
            assert policy.grow_each(ids) == batch
            policy.usage()
            policy.drain()
            policy.look_ahead()
        for seq in seqs:
            policy.release(seq.seq_id)

    return body


def replay_paged() -> Body:
    """A modelled replay of 20 requests with PagedPolicy, some of them preempted."""
    from kvarena.allocators.kv_layout import attention_layout
    from kvarena.allocators.paged.policy import PagedConfig, PagedPolicy

    layout = attention_layout(num_layers=40, num_kv_heads=40, head_size=128)
    return _replay(lambda: PagedPolicy(PagedConfig(), layout, 200 * BLOCK * layout.token_bytes, max_tokens=2048))


def replay_vattention() -> Body:
    """A modelled replay of 20 requests with VAttentionPolicy."""
    from kvarena.allocators.kv_layout import attention_layout
    from kvarena.allocators.vattention.policy import VAttentionConfig, VAttentionPolicy

    layout = attention_layout(num_layers=40, num_kv_heads=40, head_size=128)
    pool_bytes = 200 * BLOCK * layout.token_bytes
    return _replay(lambda: VAttentionPolicy(VAttentionConfig(page_group="2MB"), layout, pool_bytes, max_tokens=2048))


def _replay(make_policy: Callable[[], object]) -> Body:
    from kvarena.harness.engine.engine import Engine
    from kvarena.harness.modelled.modelled_executor import ActionPrices, ModelledExecutor
    from kvarena.harness.modelled.step_model import StepModel
    from kvarena.harness.requests.request import Request
    from kvarena.harness.scheduler.registry import config_class, make_scheduler

    model = StepModel(False, 12_000_000_000, 340_000_000, 16_500_000_000, 130_000_000, 527_000)
    prices = ActionPrices(map_ps=(3_200_000_000,), unmap_ps=(2_720_000_000,))

    def body() -> None:
        requests = [Request(i, 20 + 37 * i % 400, 10 + 53 * i % 300, arrival_ps=i * 10**11) for i in range(20)]
        scheduler = make_scheduler(config_class("vllm")(), make_policy(), 2048)  # type: ignore[arg-type]
        Engine(scheduler, ModelledExecutor(model, prices)).run(requests)

    return body


def decode_contiguous() -> Body:
    """Numba kernel: 10 decode calls over 4 rows of 128 tokens, few enough for a cache that no neighbour shares."""
    return _decode("static")


def decode_paged() -> Body:
    """Numba kernel: the same through a block table."""
    return _decode("paged")


def _decode(allocator: str) -> Body:
    import torch

    from kvarena.kernels.registry import get_kernel

    store, view = _served(allocator, batch=4, tokens=128)
    q = torch.ones(4, 8, 64)
    out, kernel = torch.empty_like(q), get_kernel("numba")

    def body() -> None:
        for _ in range(10):
            kernel.decode(q, store.layer(0), view, out)

    return body


def append_kv() -> Body:
    """K and V of one decode step written into 4 layers of a paged cache, 8 sequences, 5 times."""
    import torch

    from kvarena.kernels.append import append

    store, view = _served("paged", batch=8, tokens=512)
    k = torch.ones(8, 4, 64)

    def body() -> None:
        for _ in range(5):
            for layer in range(LAYERS):
                append(k, k, store.layer(layer), view)

    return body


def copy_on_write() -> Body:
    """Blocks of 8 KB copied for 64 sequences, in 8 tensors, in one call: what a step's forks write first."""
    import torch

    from kvarena.allocators.memory.byte_copies import ByteCopies, Runs

    pool = torch.ones(8, 128, 2048)
    copies = ByteCopies([tensor.data_ptr() for tensor in pool], pool.device)

    def body() -> None:
        for _ in range(4):
            copies(Runs.of_blocks(range(64), range(64, 128), pool[0, 0].nbytes))

    return body


def view_paged() -> Body:
    """Views of a growing batch of 32 sequences under block tables, 32 steps."""
    return _views("paged")


def view_contiguous() -> Body:
    """Views of the same batch over rows."""
    return _views("static")


def _views(allocator: str) -> Body:
    store, _ = _served(allocator, batch=32, tokens=512)
    ids, ones = list(range(32)), [1] * 32

    def body() -> None:
        for step in range(32):
            store.view(ids, [480 + step] * 32, ones)

    return body


LAYERS = 4


def _served(allocator: str, batch: int, tokens: int) -> "tuple[Store, BatchView]":
    """A store of `batch` sequences of `tokens` tokens, float32, 4 KV heads of 64, and the view of a decode step."""
    import torch

    from kvarena.allocators.kv_layout import attention_layout
    from kvarena.allocators.policy import Admission, Sequence
    from kvarena.allocators.registry import config_class, make_policy
    from kvarena.allocators.stores import make_store
    from kvarena.kernels.threads import set_compute_threads

    set_compute_threads(1)
    layout = attention_layout(LAYERS, 4, 64, "float32")
    config = config_class(allocator)(name=allocator)
    policy = make_policy(config, layout, (batch + 1) * tokens * layout.token_bytes, tokens)
    for seq_id in range(batch):
        assert policy.admit(Admission([Sequence(seq_id, tokens, 0)], tokens)) is not None
    store = make_store(policy, LAYERS, 4, 64, torch.float32)
    return store, store.view(range(batch), [tokens] * batch, [1] * batch)


def host_map_unmap() -> Body:
    """Host driver: 64 page-groups of 64 KB mapped one by one, and unmapped."""
    from kvarena.allocators.vmm.host import HostDriver

    size = 64 << 10
    driver = HostDriver(size)
    base, handles = driver.reserve(64 * size), driver.create(64)

    def body() -> None:
        for slot, handle in enumerate(handles):
            driver.map(base, slot * size, [handle])
        driver.unmap(base, 0, len(handles))

    return body


BENCHMARKS: dict[str, Callable[[], Body]] = {
    "paged policy, block by block": paged_block_by_block,
    "paged policy, batch step": paged_batch_step,
    "vattention policy, batch step": vattention_batch_step,
    "modelled replay, paged": replay_paged,
    "modelled replay, vattention": replay_vattention,
    "decode attention, contiguous": decode_contiguous,
    "decode attention, paged": decode_paged,
    "append K/V, paged": append_kv,
    "view of a batch, contiguous": view_contiguous,
    "copy-on-write of a batch": copy_on_write,
    "view of a batch, paged": view_paged,
    "host driver, map and unmap": host_map_unmap,
}
