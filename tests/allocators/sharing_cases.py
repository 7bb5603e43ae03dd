"""Policies whose sequences share: every allocator over real memory, and small pools to follow by hand."""

from kvarena.allocators.kv_layout import attention_layout
from kvarena.allocators.paged.policy import PagedConfig, PagedPolicy
from kvarena.allocators.registry import allocator_names, config_class, make_policy
from kvarena.allocators.sizes import KB
from kvarena.allocators.stores import make_store
from kvarena.allocators.vattention.policy import VAttentionConfig, VAttentionPolicy

LAYERS, HEADS, SIZE = 2, 4, 64  # float32: 1 KB of K, and of V, a token in a layer
MAX_TOKENS = 128
OPTIONS = {
    "paged": {"block_size": 4, "swap_bytes": 256 * KB, "watermark": 0.0},
    "fastertransformer": {"max_padded_tokens": MAX_TOKENS},
    "vattention": {"page_group": "64KB", "max_rows": 9, "watermark": 0.0},
}
CASES = [(name, {}) for name in allocator_names()] + [
    ("vattention", {"tensor_slicing": True}),  # 32 tokens a page-group
    ("vattention", {"tensor_slicing": True, "overlap": False, "deferred_reclamation": False}),
    ("vattention", {"tensor_slicing": True, "copy_beams": True}),
]


def make(name, options, pool_bytes):
    layout = attention_layout(LAYERS, HEADS, SIZE, "float32")
    config = config_class(name)(name=name, **OPTIONS.get(name, {}), **options)
    policy = make_policy(config, layout, pool_bytes, MAX_TOKENS)
    return policy, make_store(policy, LAYERS, HEADS, SIZE, "float32")


def blocks_of(num_blocks=16, block_size=4, **options):
    """Blocks of so many tokens, no store."""
    layout = attention_layout(2, 4, 8)
    pool = num_blocks * block_size * layout.token_bytes
    return PagedPolicy(PagedConfig(block_size=block_size, watermark=0.0, **options), layout, pool, max_tokens=2048)


def rows_of(page_groups=40, **options):
    """Page-groups of 32 tokens over both layers (sliced), no store."""
    layout = attention_layout(LAYERS, HEADS, SIZE, "float32")
    switches = {"page_group": "64KB", "max_rows": 6, "watermark": 0.0, "tensor_slicing": True} | options
    return VAttentionPolicy(VAttentionConfig(**switches), layout, page_groups * 2 * 64 * KB, max_tokens=MAX_TOKENS)
