"""Small vAttention policies to follow by hand.

One layer, K and V: a slab is two page-groups. 64 KB hold 64 tokens of 1 KB.
"""

from kvarena.allocators.kv_layout import attention_layout
from kvarena.allocators.policy import Admission, Map, Sequence, Unmap
from kvarena.allocators.sizes import KB
from kvarena.allocators.vattention.policy import VAttentionPolicy

LAYOUT = attention_layout(1, 4, 128)  # 1 KB a token in K, and in V
SLAB = 128 * KB
TOKENS = 64  # of one slab
ALL_OFF = {
    "overlap": False,
    "deferred_reclamation": False,
    "eager_allocation": False,
    "reclaim_threshold": 0.0,
    "watermark": 0.0,
}


def policy_of(slabs: int = 8, rows: int = 4, **switches) -> VAttentionPolicy:
    options = ALL_OFF | {"page_group": "64KB", "max_tokens": 1024, "max_rows": rows} | switches
    return VAttentionPolicy(LAYOUT, slabs * SLAB, **options)


def admit(policy: VAttentionPolicy, seq_id: int, slabs: int, final_slabs: int | None = None) -> bool:
    """Admit a sequence that fills so many slabs; in the end it will fill `final_slabs`."""
    prompt = slabs * TOKENS
    return (
        policy.admit(Admission([Sequence(seq_id, prompt, (final_slabs or slabs) * TOKENS - prompt)], prompt))
        is not None
    )


def counts(actions) -> tuple[int, int]:
    """(maps, unmaps)."""
    return sum(isinstance(a, Map) for a in actions), sum(isinstance(a, Unmap) for a in actions)


def rows_mapped(policy: VAttentionPolicy, actions, before: dict[int, int] | None = None) -> dict[int, int]:
    """Slabs by row, after `actions`."""
    slabs = dict(before or {})
    for action in actions:
        slabs[action.row] = slabs.get(action.row, 0) + (1 if isinstance(action, Map) else -1)
    return slabs
