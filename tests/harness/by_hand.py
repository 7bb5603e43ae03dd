"""Batches small enough to follow by hand: blocks of 4 tokens, sequences of 64 at most."""

from kvarena.allocators.kv_layout import attention_layout
from kvarena.allocators.paged.policy import PagedConfig, PagedPolicy
from kvarena.harness.scheduler.registry import config_class, make_scheduler

LAYOUT = attention_layout(1, 1, 8)
BLOCK_BYTES = 4 * LAYOUT.token_bytes


def paged(blocks, watermark=0.0, swap_blocks=0):
    """A pool of so many blocks."""
    return PagedPolicy(
        PagedConfig(block_size=4, watermark=watermark, swap_bytes=swap_blocks * BLOCK_BYTES),
        LAYOUT,
        blocks * BLOCK_BYTES,
        max_tokens=64,
    )


def make(name, policy, **options):
    """A scheduler by its name, over a policy."""
    return make_scheduler(config_class(name)(name=name, **options), policy, max_tokens=64)
