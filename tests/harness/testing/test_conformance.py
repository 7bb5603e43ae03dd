"""Every allocator serves the same tokens and decides alike under both clocks; one that corrupts memory is caught."""

import pytest

from kvarena.allocators.kv_layout import KVLayout
from kvarena.allocators.paged.policy import PagedConfig, PagedPolicy
from kvarena.allocators.policy import Policy
from kvarena.allocators.registry import allocator_names, config_class, make_policy
from kvarena.harness.testing.conformance import check_serving

PADDED = "fastertransformer"  # its batches need its own scheduler
OPTIONS = {"vattention": {"page_group": "64KB", "max_rows": 12}}
POOLS = {"vattention": 5120, "static": 200, "orca_max": 200}  # tokens; page-groups are coarse for so small a model


@pytest.mark.parametrize("name", [name for name in allocator_names() if name != PADDED])
def test_every_allocator_conforms(name: str) -> None:
    def make(kv_layout: KVLayout, pool_bytes: int, max_tokens: int) -> Policy:
        return make_policy(config_class(name)(name=name, **OPTIONS.get(name, {})), kv_layout, pool_bytes, max_tokens)

    seen = check_serving(make, pool_tokens=POOLS.get(name, 150))
    assert 1 < seen.most_running < 11, "the pool must be too small for all of them"


class Forgetful(PagedPolicy):
    """Gives out a block that a sequence still reads."""

    def block_table(self, seq_id: int) -> list[int]:
        table = super().block_table(seq_id)
        return [table[0], *table[:-1]]


def test_a_wrong_block_table_changes_a_token() -> None:
    with pytest.raises(AssertionError, match="request"):
        check_serving(lambda layout, size, most: Forgetful(PagedConfig(block_size=4), layout, size, most))
