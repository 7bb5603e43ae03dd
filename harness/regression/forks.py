"""The exact tier's program of copy-on-write: groups of sequences that share a prompt, as parallel sampling forks them.

Replays fork nothing yet, so this drives the paged policy by itself.
"""

from kvarena.allocators.kv_layout import attention_layout
from kvarena.allocators.paged import PagedPolicy
from kvarena.allocators.policy import CopyBlock, Sequence
from kvarena.harness.regression.counting import counted_takes
from kvarena.harness.seeded import Stream

GROUPS, SAMPLES, OUTPUT_TOKENS = 40, 4, 48
LAYOUT = attention_layout(num_layers=2, num_kv_heads=2, head_size=64)
POOL_BLOCKS = 400


def count_forks() -> dict[str, str]:
    """Serve groups one after the other, two at a time; count blocks taken and copied."""
    policy = PagedPolicy(LAYOUT, POOL_BLOCKS * 16 * LAYOUT.token_bytes, max_tokens=2048)
    prompts = (1 + Stream(0, "prompts").below(GROUPS, 500)).tolist()
    copies = 0
    with counted_takes() as takes:
        for group, prompt in enumerate(prompts):
            ids = _fork(policy, group, prompt)
            for _ in range(OUTPUT_TOKENS):
                for seq_id in ids:
                    assert policy.grow(seq_id), "the pool holds two groups"
                copies += sum(isinstance(action, CopyBlock) for action in policy.drain())
            if group:
                _release(policy, group - 1)
    return {"copies": str(copies), "allocations": str(takes.units), "peak_units": str(takes.peak)}


def _ids(group: int) -> range:
    return range(group * SAMPLES, (group + 1) * SAMPLES)


def _fork(policy: PagedPolicy, group: int, prompt: int) -> range:
    first, *others = ids = _ids(group)
    assert policy.admit(Sequence(first, prompt, OUTPUT_TOKENS), prompt), "the pool holds two groups"
    for seq_id in others:
        policy.fork(first, Sequence(seq_id, prompt, OUTPUT_TOKENS))
    return ids


def _release(policy: PagedPolicy, group: int) -> None:
    for seq_id in _ids(group):
        policy.release(seq_id)
