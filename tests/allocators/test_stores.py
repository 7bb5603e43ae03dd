"""What every store must do, under every policy: each position of each sequence has memory of its own, and keeps it."""

import gc

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvarena.allocators.kv_layout import attention_layout, latent_layout
from kvarena.allocators.memory.store import Store
from kvarena.allocators.policy import Admission, Policy, Sequence
from kvarena.allocators.registry import allocator_names, config_class, make_policy
from kvarena.allocators.sizes import KB, MB
from kvarena.allocators.stores import make_store
from kvarena.allocators.vattention.policy import VAttentionPolicy
from kvarena.errors import UserError
from kvarena.kernels.layout import Layout
from kvarena.kernels.view import BatchView, LayerCache

LAYERS, HEADS, SIZE = 2, 4, 64
MAX_TOKENS = 200
OPTIONS = {
    "paged": {"block_size": 4, "swap_bytes": MB},
    "fastertransformer": {"max_padded_tokens": 200},
    "vattention": {"page_group": "64KB", "max_rows": 12},
}
CASES = [(name, {}) for name in allocator_names()] + [
    ("vattention", {"tensor_slicing": True}),
    ("vattention", {"overlap": False, "deferred_reclamation": False, "eager_allocation": False}),
]


def make(
    name: str, options: dict[str, object], dtype: str = "float32", pool_bytes: int = 4 * MB
) -> tuple[Policy, Store]:
    layout = attention_layout(LAYERS, HEADS, SIZE, dtype)
    config = config_class(name)(name=name, **OPTIONS.get(name, {}), **options)
    policy = make_policy(config, layout, pool_bytes, MAX_TOKENS)
    return policy, make_store(policy, LAYERS, HEADS, SIZE, dtype)


def where(cache: LayerCache, view: BatchView, index: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """K and V, each [H, D], of every position of the view's sequence `index`."""
    length = int(view.lengths[index])
    if cache.layout is Layout.CONTIGUOUS:
        row = int(view.rows[index])
        return [(cache.k[row, p], cache.v[row, p]) for p in range(length)]
    size = cache.block_size
    at = [(int(view.block_table[index, p // size]), p % size) for p in range(length)]
    return [(cache.k[i], cache.v[i]) for i in at]


def tag(seq_id: int, position: int, layer: int) -> float:
    """A number that bfloat16 holds, hardly ever the same in two places."""
    return float((seq_id * 37 + position * 5 + layer * 3) % 251)


def write(store: Store, view: BatchView, seq_ids: list[int], first: list[int]) -> None:
    """Write tags at the positions from `first` on."""
    for layer in range(LAYERS):
        for index, seq_id in enumerate(seq_ids):
            for p, (k, v) in enumerate(where(store.layer(layer), view, index)):
                if p >= first[index]:
                    k.fill_(tag(seq_id, p, layer))
                    v.fill_(-tag(seq_id, p, layer))


def check(store: Store, view: BatchView, seq_ids: list[int]) -> None:
    """Every position holds its tag, in every element of K and V of every layer."""
    for layer in range(LAYERS):
        for index, seq_id in enumerate(seq_ids):
            for p, (k, v) in enumerate(where(store.layer(layer), view, index)):
                expected = tag(seq_id, p, layer)
                assert k.min() == k.max() == expected, (layer, seq_id, p)
                assert v.min() == v.max() == -expected, (layer, seq_id, p)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_sequences_keep_what_they_wrote_while_they_grow(name, options, dtype):
    policy, store = make(name, options, dtype)
    ids = [
        seq_id
        for seq_id in range(3)
        if policy.admit(Admission([Sequence(seq_id, 20 + seq_id, 60)], 20 + seq_id)) is not None
    ]
    assert len(ids) > 1
    written = [0] * len(ids)
    for grow in (0, 1, 1, 17):
        assert all(policy.grow(seq_id, grow) for seq_id in ids if grow)
        lengths = [policy.length(seq_id) for seq_id in ids]
        store.apply(policy.drain())
        view = store.view(ids, lengths, [1 if grow == 1 else n - w for n, w in zip(lengths, written, strict=True)])
        store.apply_in_background(policy.look_ahead())
        write(store, view, ids, written)
        written = lengths
    check(store, store.view(ids, written, [1] * len(ids)), ids)
    store.close()


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_view_says_lengths_and_queries(name, options):
    policy, store = make(name, options)
    for seq_id in (0, 1):
        assert policy.admit(Admission([Sequence(seq_id, 20, 10)], 20)) is not None
    store.apply(policy.drain())
    decode, chunk = store.view([1, 0], [20, 19], [1, 1]), store.view([0, 1], [12, 20], [5, 20])
    assert decode.is_decode
    assert decode.lengths.tolist() == [20, 19]
    assert decode.query_starts.tolist() == [0, 1, 2]
    assert (decode.max_length, decode.max_queries) == (20, 1)
    assert chunk.query_starts.tolist() == [0, 5, 25]
    assert (chunk.max_length, chunk.max_queries, chunk.batch_size) == (20, 20, 2)
    for view in (decode, chunk):
        assert (view.lengths.dtype, view.query_starts.dtype) == (torch.int32, torch.int32)
        assert (view.rows is None) == (policy.memory_layout is Layout.PAGED)
        assert (view.block_table is None) == (policy.memory_layout is Layout.CONTIGUOUS)
    cache = store.layer(0)
    assert cache.layout is policy.memory_layout
    assert cache.k[0, 0].is_contiguous()
    assert store.layer(0).k is cache.k
    store.close()


@pytest.mark.parametrize(("name", "options"), CASES)
def test_physical_bytes_are_the_systems_from_the_start(name, options):
    policy, store = make(name, options)
    physical = store.physical()
    assert physical.mapped_bytes + physical.pooled_bytes == physical.counted_bytes == policy.pool_bytes
    expected = policy.mapped_bytes if isinstance(policy, VAttentionPolicy) else policy.pool_bytes
    assert physical.mapped_bytes == expected
    store.close()


@pytest.mark.parametrize(("name", "options"), CASES)
def test_closing_twice_and_in_any_order(name, options):
    policy, store = make(name, options)
    layer = store.layer(LAYERS - 1)
    assert policy.admit(Admission([Sequence(0, 20, 10)], 20)) is not None
    store.apply(policy.drain())
    store.apply_in_background(policy.look_ahead())
    store.close()
    store.close()
    assert store.physical() == (0, 0, 0)
    del store, policy
    gc.collect()
    del layer


class Churn(RuleBasedStateMachine):
    """Sequences come, grow and go on real page-groups; after each step the books are the system's."""

    @initialize(
        dtype=st.sampled_from(["float32", "bfloat16"]),
        groups=st.integers(12, 40),
        switches=st.fixed_dictionaries(
            {
                "overlap": st.booleans(),
                "deferred_reclamation": st.booleans(),
                "eager_allocation": st.booleans(),
                "reclaim_threshold": st.sampled_from([0.0, 0.3]),
                "tensor_slicing": st.booleans(),
            }
        ),
    )
    def start(self, dtype: str, groups: int, switches: dict[str, object]) -> None:
        self.policy, self.store = make("vattention", switches, dtype, groups * 64 * KB)
        self.ids: list[int] = []
        self.next_id = 0

    @rule(prompt=st.integers(1, 150))
    def admit(self, prompt: int) -> None:
        if self.policy.admit(Admission([Sequence(self.next_id, prompt, MAX_TOKENS - prompt)], prompt)) is not None:
            self.ids.append(self.next_id)
            self.step(write_from={self.next_id: 0})
        self.next_id += 1

    @precondition(lambda self: self.ids)
    @rule(index=st.integers(0, 9), tokens=st.integers(1, 80))
    def grow(self, index: int, tokens: int) -> None:
        seq_id = self.ids[index % len(self.ids)]
        length = self.policy.length(seq_id)
        if self.policy.grow(seq_id, tokens):
            self.step(write_from={seq_id: length})

    @precondition(lambda self: self.ids)
    @rule(index=st.integers(0, 9))
    def release(self, index: int) -> None:
        self.policy.release(self.ids.pop(index % len(self.ids)))
        self.step(write_from={})

    def step(self, write_from: dict[int, int]) -> None:
        self.store.apply(self.policy.drain())
        self.store.apply_in_background(self.policy.look_ahead())
        if self.ids:
            lengths = [self.policy.length(seq_id) for seq_id in self.ids]
            view = self.store.view(self.ids, lengths, [1] * len(self.ids))
            write(self.store, view, self.ids, [write_from.get(i, n) for i, n in zip(self.ids, lengths, strict=True)])

    @invariant()
    def the_books_are_the_systems(self) -> None:
        self.policy.check_integrity()
        physical = self.store.physical()
        assert physical.mapped_bytes == self.policy.mapped_bytes
        assert physical.mapped_bytes + physical.pooled_bytes == physical.counted_bytes

    @precondition(lambda self: self.ids)
    @rule()
    def nobody_lost_anything(self) -> None:
        lengths = [self.policy.length(seq_id) for seq_id in self.ids]
        check(self.store, self.store.view(self.ids, lengths, [1] * len(self.ids)), self.ids)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            if self.ids:
                self.nobody_lost_anything()
            self.store.close()


TestChurn = Churn.TestCase
TestChurn.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)


# ---- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["static", "paged", "vattention"])
def test_a_layout_that_only_a_modelled_clock_runs(name):
    layout = latent_layout(LAYERS, SIZE)
    policy = make_policy(config_class(name)(name=name, **OPTIONS.get(name, {})), layout, 64 * MB, MAX_TOKENS)
    with pytest.raises(UserError, match=r"K and V of every position.*clock=modelled"):
        make_store(policy, LAYERS, 1, SIZE, "bfloat16")


def test_a_pool_larger_than_the_machine(monkeypatch):
    monkeypatch.setattr("kvarena.allocators.vmm.host.available_bytes", lambda: 3 * MB)
    for name in ("static", "paged", "vattention"):
        with pytest.raises(UserError, match=r"cannot create 4MB.*3MB of memory are free"):
            make(name, {})


def test_a_device_without_a_driver():
    policy, store = make("static", {})
    store.close()
    with pytest.raises(UserError, match="device=cuda"):
        make_store(policy, LAYERS, HEADS, SIZE, "float32", "cuda")


@pytest.mark.parametrize(("layout", "said"), [(Layout.PAGED, "block_table"), (Layout.CONTIGUOUS, "row_tokens")])
def test_a_policy_that_lacks_what_its_store_asks_for(layout, said):
    policy = make("static" if layout is Layout.PAGED else "paged", {})[0]
    policy.memory_layout = layout
    with pytest.raises(UserError, match=f"allocator .*lacks .*{said}"):
        make_store(policy, LAYERS, HEADS, SIZE, "float32")
