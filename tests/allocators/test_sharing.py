"""Groups, forks and prefixes under every allocator, on real memory."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarena.allocators.kv_layout import attention_layout
from kvarena.allocators.registry import ALLOCATORS, config_class, make_policy
from kvarena.allocators.sharing_programs import Programs
from kvarena.allocators.sizes import KB
from kvarena.allocators.stores import make_store

LAYERS, HEADS, SIZE = 2, 4, 64  # float32: 1 KB of K, and of V, a token in a layer
MAX_TOKENS = 128
OPTIONS = {
    "paged": {"block_size": 4, "swap_bytes": 256 * KB, "watermark": 0.0},
    "fastertransformer": {"max_padded_tokens": MAX_TOKENS},
    "vattention": {"page_group": "64KB", "max_rows": 9, "watermark": 0.0},
}
CASES = [(name, {}) for name in ALLOCATORS] + [
    ("vattention", {"tensor_slicing": True}),  # 32 tokens a page-group
    ("vattention", {"tensor_slicing": True, "overlap": False, "deferred_reclamation": False}),
]


def make(name, options, pool_bytes):
    layout = attention_layout(LAYERS, HEADS, SIZE, "float32")
    config = config_class(name)(name=name, **OPTIONS.get(name, {}), **options)
    policy = make_policy(config, layout, pool_bytes, MAX_TOKENS)
    return policy, make_store(policy, LAYERS, HEADS, SIZE, "float32")


@pytest.mark.parametrize(("name", "options"), CASES)
def test_random_programs(name, options):
    policy, store = make(name, options, 1200 * KB)
    programs = Programs(policy, store, LAYERS)

    @settings(max_examples=12, deadline=None)
    @given(data=st.data())
    def play(data):
        choices = iter(data.draw(st.lists(st.integers(0, 1 << 16), min_size=90, max_size=90)))
        programs.play(lambda below: next(choices, 0) % below, 18)

    play()
    store.close()
