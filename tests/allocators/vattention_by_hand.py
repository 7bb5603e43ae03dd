"""Small vAttention policies to follow by hand.

One layer, K and V: page-groups come in pairs, of one number. 64 KB hold 64 tokens of 1 KB.
"""

from kvarena.allocators.kv_layout import attention_layout
from kvarena.allocators.policy import Admission, Map, Sequence, Unmap
from kvarena.allocators.sizes import KB
from kvarena.allocators.vattention.policy import VAttentionConfig, VAttentionPolicy

LAYOUT = attention_layout(1, 4, 128)  # 1 KB a token in K, and in V
PAIR = 128 * KB  # a page-group of K and one of V
TOKENS = 64  # of one pair
ALL_OFF = {
    "overlap": False,
    "deferred_reclamation": False,
    "eager_allocation": False,
    "reclaim_threshold": 0.0,
    "watermark": 0.0,
}


def policy_of(page_groups: int = 8, rows: int = 4, more: int = 0, **switches) -> VAttentionPolicy:
    options = ALL_OFF | {"page_group": "64KB", "max_rows": rows} | switches
    return VAttentionPolicy(VAttentionConfig(**options), LAYOUT, page_groups * PAIR + more, 1024)


def admit(policy: VAttentionPolicy, seq_id: int, page_groups: int, final_page_groups: int | None = None) -> bool:
    """Admit a sequence that fills so many page-groups; in the end it will fill `final_page_groups`."""
    prompt = page_groups * TOKENS
    return (
        policy.admit(
            Admission([Sequence(seq_id, prompt, (final_page_groups or page_groups) * TOKENS - prompt)], prompt)
        )
        is not None
    )


def counts(actions) -> tuple[int, int]:
    """(maps, unmaps)."""
    return sum(isinstance(a, Map) for a in actions), sum(isinstance(a, Unmap) for a in actions)


def rows_mapped(policy: VAttentionPolicy, actions, before: dict[int, int] | None = None) -> dict[int, int]:
    """Page-groups by row, after `actions`."""
    page_groups = dict(before or {})
    for action in actions:
        page_groups[action.row] = page_groups.get(action.row, 0) + (1 if isinstance(action, Map) else -1)
    return page_groups
