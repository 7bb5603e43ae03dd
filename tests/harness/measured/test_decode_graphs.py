"""Decode steps as graphs: the same tokens, from buffers that stay where they are.

A CUDA graph is faked by what it is (`fake_graph.py`): whatever a step takes from the host, or reads elsewhere the next
time, comes out wrong here as it would on a GPU.
"""

from contextlib import contextmanager

import pytest
import torch
from fake_graph import FakeGraph

from kvarena.allocators.registry import config_class, make_policy
from kvarena.allocators.stores import make_store
from kvarena.errors import UserError
from kvarena.harness.engine.engine import Engine
from kvarena.harness.measured import decode_graphs, torch_executor
from kvarena.harness.measured.decode_graphs import SHORTEST, CudaCapture, DecodeGraphs, rounded_up
from kvarena.harness.measured.torch_executor import TorchExecutor
from kvarena.harness.model import load_preset
from kvarena.harness.model.build import build_model
from kvarena.harness.requests.request import Request
from kvarena.harness.scheduler.registry import config_class as scheduler_class
from kvarena.harness.scheduler.registry import make_scheduler
from kvarena.kernels.kernel import AttentionKernel
from kvarena.kernels.reference import reference_attention
from kvarena.kernels.registry import get_kernel, kernel_spec

LENGTHS = [(250, 12), (7, 30), (40, 9), (3, 25), (31, 20)]  # the first crosses into graphs of 512 tokens
MAX_TOKENS = 600
ALLOCATORS = {
    "static": {},
    "paged": {"block_size": 4},
    "vattention": {"page_group": "64KB", "max_rows": 8},
}


@pytest.fixture(scope="module")
def model():
    return build_model(load_preset("tiny-llama"), "cpu")


# ---- a step of operations alone --------------------------------------------------------------------------------


class Operations(AttentionKernel):
    """Decodes with torch's operations on fixed shapes, reading lengths and places from the view's tensors only."""

    spec = kernel_spec("triton")

    def decode(self, q, cache, view, out):
        position = torch.arange(view.max_length)
        if view.block_table is not None:
            blocks = view.block_table.long()[:, position // cache.block_size]  # [B, S]
            k, v = (x[blocks, position % cache.block_size] for x in (cache.k, cache.v))  # [B, S, H, D]
        else:
            k, v = (x[view.rows.long()[:, None], position] for x in (cache.k, cache.v))
        inside = (position < view.lengths[:, None])[:, None, None]  # [B, 1, 1, S]
        heads, size = k.shape[2:]
        queries = q.view(len(q), heads, -1, size)
        scores = torch.einsum("bhgd,bshd->bhgs", queries, k.nan_to_num()) / size**0.5
        weights = scores.masked_fill(~inside, float("-inf")).softmax(-1)
        out.copy_(torch.einsum("bhgs,bshd->bhgd", weights, v.nan_to_num()).reshape(q.shape))

    def prefill(self, q, cache, view, out):
        out.copy_(reference_attention(q, cache, view))


def append_by_operations(k_new, v_new, cache, view):
    """What `append_triton` does: nothing is asked of the device."""
    if view.max_queries > 1:
        return torch_executor_append(k_new, v_new, cache, view)
    at = view.lengths.long() - 1
    if view.block_table is not None:
        block = view.block_table.long().gather(1, (at // cache.block_size)[:, None])[:, 0]
        at = at % cache.block_size
    else:
        block = view.rows.long()
    cache.k.index_put_((block, at), k_new)
    cache.v.index_put_((block, at), v_new)
    return None


torch_executor_append = torch_executor.append


class Gpu:
    """Stands for what of torch.cuda a capture uses; notes the order of calls."""

    def __init__(self, monkeypatch):
        self.calls, self.graphs = [], []
        for name in ("graph_pool_handle", "Stream", "current_stream", "stream", "CUDAGraph", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def graph_pool_handle(self):
        self.calls.append("pool")
        return "the pool"

    def Stream(self):
        return FakeStream("aside", self.calls)

    def current_stream(self):
        return FakeStream("current", self.calls)

    @contextmanager
    def stream(self, stream):
        self.calls.append(f"enter {stream.name}")
        yield
        self.calls.append(f"leave {stream.name}")

    def CUDAGraph(self):
        self.graphs.append(FakeGraph())
        return self.graphs[-1]

    @contextmanager
    def graph(self, graph, pool, capture_error_mode):
        self.calls.append(f"capture into {pool}, {capture_error_mode}")
        with graph:
            yield
        self.calls.append("captured")


class FakeStream:
    def __init__(self, name, calls):
        self.name, self.calls = name, calls

    def wait_stream(self, other):
        self.calls.append(f"{self.name} waits for {other.name}")


# ---- replays ---------------------------------------------------------------------------------------------------


def served(model, allocator, kernel, graphs=None):
    """Tokens of every request, and the executor."""
    layout = model.config.kv_layout()
    policy = make_policy(
        config_class(allocator)(name=allocator, **ALLOCATORS[allocator]), layout, 6000 * layout.token_bytes, MAX_TOKENS
    )
    shape = (model.config.num_layers, model.config.num_kv_heads, model.config.head_size)
    store = make_store(policy, *shape, "float32")
    executor = TorchExecutor(model, store, kernel)
    if graphs is not None:
        executor._graphs = graphs
    tokens = {}
    executor.finish = lambda request: tokens.update({request.seq_id: executor.tokens[request.seq_id]})
    scheduler = make_scheduler(scheduler_class("vllm")(name="vllm"), policy, MAX_TOKENS)
    try:
        Engine(scheduler, executor).run(Request(i, *lengths) for i, lengths in enumerate(LENGTHS))
    finally:
        store.close()
    return tokens, executor


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_fixed_buffers_yield_the_same_tokens(model, allocator):
    plain, _ = served(model, allocator, get_kernel("numba"))
    fixed, executor = served(
        model, allocator, get_kernel("numba"), DecodeGraphs(get_kernel("numba"), model.device, MAX_TOKENS)
    )
    assert fixed == plain
    assert len(executor._graphs) >= len(LENGTHS)  # one for each batch size, as requests end one by one


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_replayed_operations_yield_the_same_tokens(model, allocator, monkeypatch):
    monkeypatch.setattr(torch_executor, "append", append_by_operations)
    plain, _ = served(model, allocator, Operations())
    gpu = Gpu(monkeypatch)
    graphs = DecodeGraphs(Operations(), model.device, MAX_TOKENS, CudaCapture())
    replayed, executor = served(model, allocator, Operations(), graphs)
    assert replayed == plain
    decode_steps = max(output for _, output in LENGTHS) - 1
    assert sum(graph.replays for graph in gpu.graphs) == decode_steps  # not one step past a graph
    assert len(gpu.graphs) == len(executor._graphs) < decode_steps  # captured once, replayed many times
    assert executor.phases.keys() == {"actions", "view", "step"}


def test_a_graph_is_captured_after_a_run_beside_and_into_one_pool(model, monkeypatch):
    gpu = Gpu(monkeypatch)
    capture = CudaCapture()
    runs = []
    for _ in range(2):
        replay = capture(lambda: runs.append(len(gpu.calls)) or torch.zeros(1))
    once = [
        "aside waits for current", "enter aside", "leave aside", "current waits for aside",
        "capture into the pool, thread_local", "captured",
    ]  # fmt: skip
    assert gpu.calls == ["pool", *once, *once]
    assert runs == [3, 6, 9, 12]  # within the stream aside, then within the capture
    assert replay() is replay()


def test_buffers_never_move(model, monkeypatch):
    """Between a graph's replays: tokens, lengths, rows or table, and what comes out."""
    seen = {}
    fill = decode_graphs.Buffers.fill

    def watched(self, tokens, view):
        fill(self, tokens, view)
        where = self.view.rows if self.view.rows is not None else self.view.block_table
        addresses = tuple(x.data_ptr() for x in (self.tokens, self.last, self.view.lengths, where))
        seen.setdefault((len(tokens), self.view.max_length), set()).add(addresses)

    monkeypatch.setattr(decode_graphs.Buffers, "fill", watched)
    for allocator in ALLOCATORS:
        seen.clear()
        served(model, allocator, get_kernel("numba"), DecodeGraphs(get_kernel("numba"), model.device, MAX_TOKENS))
        assert {len(addresses) for addresses in seen.values()} == {1}
        assert len({address for addresses in seen.values() for one in addresses for address in one}) == 4 * len(seen)


@pytest.mark.parametrize(
    ("length", "longest"),
    [(1, SHORTEST), (SHORTEST, SHORTEST), (SHORTEST + 1, 2 * SHORTEST), (600, 700), (700, 700)],
)
def test_longest_length_of_a_graph(length, longest):
    assert rounded_up(length, up_to=700) == longest


def test_every_layout_is_captured_for_the_same_longest_length(model, monkeypatch):
    """Else a kernel would cut its work otherwise over one of them, and be compared for that."""
    longest = {}
    buffers = decode_graphs._buffers
    for allocator in ALLOCATORS:
        seen = longest.setdefault(allocator, set())
        monkeypatch.setattr(
            decode_graphs, "_buffers", lambda view, most, cache, seen=seen: seen.add(most) or buffers(view, most, cache)
        )
        served(model, allocator, get_kernel("numba"), DecodeGraphs(get_kernel("numba"), model.device, MAX_TOKENS))
    assert len({frozenset(seen) for seen in longest.values()}) == 1


def test_a_kernel_that_asks_the_host_is_refused_on_a_gpu():
    kernel = get_kernel("sdpa")
    assert kernel.spec == kernel_spec("sdpa")
    with pytest.raises(UserError, match=r"kernel sdpa .*fa2, fa3, .*triton"):
        DecodeGraphs(kernel, torch.device("cuda"), MAX_TOKENS)
