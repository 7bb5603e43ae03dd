"""What the allocators' prefix caches find, and what they save when they serve."""

import json
from collections.abc import Callable

import pandas as pd
import pytest

from kvarena.errors import UserError


def by_way(summary: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """[system, way] of a quantity that has both."""
    rows = summary[summary.quantity.str.startswith(f"{quantity}:")]
    return rows.assign(way=rows.quantity.str.split(":").str[1]).pivot(index="system", columns="way", values="value")


def test_counts_of_a_trace_with_block_ids(summary_of: Callable[..., pd.DataFrame], data_file: Callable) -> None:
    path = data_file("mooncake_synthetic.jsonl")
    summary = summary_of(
        "prefix_cache", f"trace.path={path}", "trace.format=mooncake", "systems=[vattention-2mb]",
        "params.capacities_gb=[100,1000]", "params.serve_requests=60", "params.serve_tp=8", "arrival.rate=2",
    )  # fmt: skip
    trace = summary[summary.system == "trace"].set_index("quantity").value
    blocks = [block for line in path.read_text().splitlines() for block in json.loads(line)["hash_ids"]]
    assert trace["blocks"] == len(blocks)
    assert trace["hit_blocks:every_id"] == len(blocks) - len(set(blocks))
    assert 0 < trace["hit_blocks:whole_blocks"] <= trace["hit_blocks:every_id"]
    served = summary[summary.quantity == "prefill_tokens:with_cache"]
    assert set(served.panel) == {"llama-3-8b mooncake_synthetic.jsonl, 8 x a100-80gb"}
    hits = summary[summary.quantity == "hit_ratio_vs_capacity"].set_index("x").value
    unlimited = summary[summary.quantity == "hit_ratio_unlimited"].value.item()
    whole = 100 * trace["hit_blocks:whole_blocks"] / len(blocks)
    assert 0 < hits[100] <= hits[1000] <= unlimited < whole * 1.05, "of tokens, and a prompt's last block is not full"


def test_chats_without_a_file(summary_of: Callable[..., pd.DataFrame]) -> None:
    """The cache saves every system prefills; who keeps the smaller units finds no less."""
    summary = summary_of("prefix_cache", "trace.num_requests=400", "params.capacities_gb=[30]")
    unlimited = summary[summary.quantity == "hit_ratio_unlimited"].set_index("system").value
    assert unlimited["vattention-2MB/lean"] < unlimited["vattention-64KB/lean"]
    assert set(summary.evidence) == {"exact", "predicted"}
    fed, ttft, reused = (by_way(summary, q) for q in ("prefill_tokens", "ttft_mean", "reused_share"))
    assert len(fed) == 4
    counted = summary[summary.quantity.str.startswith("hit_") | (summary.system == "trace")]
    assert set(counted.evidence) == {"exact"}
    assert set(summary.panel) == {"llama-3-8b sharegpt_chat, 1 x a100-80gb"}
    assert (fed.with_cache < 0.8 * fed.without_cache).all()
    assert (ttft.with_cache < ttft.without_cache).all()
    assert (reused.without_cache == 0).all()
    assert (reused.with_cache > 20).all()
    assert by_way(summary, "stall_mean").loc["paged/lean"].tolist() == [0, 0]


def test_measured(summary_of: Callable[..., pd.DataFrame]) -> None:
    """Real tokens and real aliases: what is found is not fed."""
    summary = summary_of(
        "prefix_cache", "clock=measured", "device=cpu", "threads=1", "trace.num_requests=30",
        "params.capacities_gb=[0.05]", "params.serve_requests=12", "params.repeats=1", "trace.cut_output=12",
        "systems=[paged,vattention-64kb]",
    )  # fmt: skip
    assert set(summary.evidence) == {"exact", "measured"}
    fed, reused = by_way(summary, "prefill_tokens"), by_way(summary, "reused_share")
    assert (fed.with_cache < fed.without_cache).all()
    assert (reused.with_cache > 0).all()


def test_an_allocator_that_keeps_nothing_is_refused(finished: Callable) -> None:
    with pytest.raises(UserError, match="orca-max keeps no prefixes"):
        finished("prefix_cache", "systems=[orca-max]")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("params.repeats=0", "params.repeats=0"),
        ("params.capacities_gb=[30,0]", "capacities_gb=0.0"),
        ("params.capacities_gb=[30,30]", "none twice"),
        ("model=llama-3-8b model.tp=2", "params.serve_tp"),
        ("allocator=paged allocator.prefix_cache=true", "with the cache and without it"),
    ],
)
def test_what_cannot_be_counted_or_served_is_refused_first(override: str, said: str, finished: Callable) -> None:
    with pytest.raises(UserError, match=said):
        finished("prefix_cache", *override.split())
