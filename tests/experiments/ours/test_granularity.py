"""Granularity: blocks and page-groups of as many tokens cost as much memory."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from kvarena.errors import UserError

SHORT = ("arrival.duration_s=60", "params.window_s=[20,60]", "params.seeds=[0]", "params.page_groups=[2MB]")


def test_batch_falls_and_waste_rises_with_the_unit(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of(
        "granularity", *SHORT, "params.block_sizes=[1,16,64,256]", "systems=[paged,vattention]",
    )  # fmt: skip
    batch = summary[summary.quantity == "mean_batched_requests_vs_tokens_per_unit"]
    waste = summary[summary.quantity == "share_of_kv_memory_vs_tokens_per_unit:last_block_waste"]
    blocks, page_groups = batch[batch.allocator == "paged"], batch[batch.allocator == "vattention"]
    assert list(blocks.x) == [1, 16, 64, 256]
    assert list(page_groups.x) == [204.8]  # 2 MB of one tensor, 10240 bytes a token
    assert (np.diff(blocks.value) < 0.3).all(), "larger units, fewer requests"
    assert blocks.value.iloc[-1] < page_groups.value.iloc[0] < blocks.value.iloc[-2], "on the same curve"
    rising = waste[waste.allocator == "paged"].value
    assert (np.diff(rising) > 0).all()
    mapped = summary[summary.quantity == "units_per_step_vs_tokens_per_unit"].set_index("allocator").value
    assert (mapped["paged"] == 0).all()
    assert mapped["vattention"] > 0
    assert set(summary.paper) == {"kvarena"}
    assert set(summary.evidence) == {"conditional"}


@pytest.mark.parametrize(
    ("system", "override", "said"),
    [
        ("contiguous", "params.seeds=[0]", "contiguous"),
        ("vattention", "params.page_groups=[1MB]", "page_group"),
        ("paged", "params.page_groups=[2MB]", "params.page_groups"),
        ("paged", "params.seeds=[-1]", "params.seeds"),
        ("paged", "params.seeds=[0,0]", "params.seeds"),
        ("paged", "params.block_sizes=[16,16]", "params.block_sizes"),
        ("paged", "params.block_sizes=[]", "params.block_sizes"),
        ("paged", "allocator.block_size=8", "allocator.block_size"),
        ("paged", "trace.seed=1", "trace.seed"),
    ],
)
def test_units_and_seeds_that_cannot_be_are_refused(finished: Callable, system: str, override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        finished("granularity", *SHORT[:2], f"systems=[{system}]", override)
