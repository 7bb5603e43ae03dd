"""What every policy must keep (`conformance.py` has the programs that find out)."""

import pytest

from kvarena.allocators.kv_layout import KVLayout, attention_layout, latent_layout, sliding_layout
from kvarena.allocators.policy import Policy
from kvarena.allocators.registry import allocator_names, config_class, make_policy
from kvarena.allocators.testing.conformance import Traits, check_policy

LAYOUTS = {
    "MHA": attention_layout(2, 4, 8),
    "GQA": attention_layout(2, 1, 8, "bfloat16"),
    "FP8 GQA": attention_layout(2, 1, 8, "float8"),
    "MLA": latent_layout(3, 18),
    "sliding + full": sliding_layout(1, 3, 24, 1, 8),
}
OPTIONS = {
    "orca_max": {"estimate": "max", "block_size": 4},
    "orca_pow2": {"estimate": "pow2", "block_size": 4},
    "orca_oracle": {"estimate": "oracle", "block_size": 4},
    "paged": {"block_size": 4, "swap_bytes": 4096},
    "paged_reserved": {"block_size": 4},
    "fastertransformer": {"batch_size": 3, "max_padded_tokens": 60},
    "vattention": {"page_group": "64KB", "max_rows": 6},
}


TRAITS = {
    "paged": Traits(forks=True),
    "fastertransformer": Traits(pads=True, rings=True),
    "static": Traits(rings=True),
    "vattention": Traits(rings=True),
}


def _fatter(group):
    """vattention's page-groups call for fatter tokens."""
    return type(group)(
        group.kind, group.num_layers, group.tensors_per_layer, group.token_bytes * 512, group.dtype, group.window
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", allocator_names())
def test_random_programs(name: str, layout: str) -> None:
    config = config_class(name)(name=name, **OPTIONS.get(name, {}))

    def make(kv_layout: KVLayout, pool_bytes: int, max_tokens: int) -> Policy:
        return make_policy(config, kv_layout, pool_bytes, max_tokens)

    kv_layout = LAYOUTS[layout]
    if name == "vattention":
        kv_layout = KVLayout(tuple(map(_fatter, kv_layout.groups)))
    programs = 6 if layout != "MHA" else 150 if name == "paged" else 40  # paged also forks and swaps
    check_policy(make, kv_layout, traits=TRAITS.get(name, Traits()), programs=programs)


def test_a_policy_that_leaks_is_caught() -> None:
    def make(kv_layout: KVLayout, pool_bytes: int, max_tokens: int) -> Policy:
        policy = make_policy(config_class("paged")(block_size=4), kv_layout, pool_bytes, max_tokens)
        policy.release = lambda seq_id: None  # type: ignore[method-assign]
        return policy

    with pytest.raises(AssertionError):
        check_policy(make, LAYOUTS["MHA"], programs=30, shorten=False)


def test_a_policy_that_breaks_its_word_is_caught() -> None:
    def make(kv_layout: KVLayout, pool_bytes: int, max_tokens: int) -> Policy:
        policy = make_policy(config_class("paged")(block_size=4), kv_layout, pool_bytes, max_tokens)
        policy.can_admit = lambda admission: True  # type: ignore[method-assign]
        return policy

    with pytest.raises(AssertionError):
        check_policy(make, LAYOUTS["MHA"], programs=1000, shorten=False)
