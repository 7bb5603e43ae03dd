"""Fig 2: shares that sum to the pool, an order of systems that any load keeps, and the published bars."""

from collections.abc import Callable

import pandas as pd
import pytest

from kvarena.allocators.usage import LEAVES
from kvarena.experiments.pagedattention.memory_waste import as_drawn, draw
from kvarena.harness.paths import PUBLISHED
from kvarena.harness.record.summary import PUBLISHED_KEY, beside_published, read_published

SHORT = ("arrival.duration_s=60", "params.window_s=[20,60]", "params.record_every_s=5")
RESERVING = [f"{name}/vllm2023" for name in ("orca_max", "orca_pow2", "orca_oracle", "contiguous", "paged_reserved")]


def test_every_share_sums_to_the_pool_under_every_average(summary_of: Callable[..., pd.DataFrame]) -> None:
    systems = "systems=[orca-max,orca-pow2,orca-oracle,contiguous,paged-reserved,paged,vattention-2mb]"
    one = "params.seeds=[0]"  # medians over seeds need not add up
    summary = summary_of("memory_waste", *SHORT, systems, one)
    shares = summary[summary.unit == "%"]
    kinds = shares.quantity.str.partition(":")[0]
    sums = shares.groupby(["system", kinds]).value.sum()
    assert len(sums) == 7 * 9 + 2  # three roll-ups under three averages, and two bars as drawn
    assert sums.round(6).eq(100).all()
    leaves = shares[kinds == "leaf_share_of_kv_memory_while_waiting"]
    assert set(leaves.quantity.str.partition(":")[2]) == set(LEAVES)

    tokens = summary[summary.quantity == "share_of_kv_memory:token_states"].set_index("system").value
    order = [*RESERVING, "vattention-2MB/vllm2023", "paged/vllm2023"]
    assert list(tokens[order]) == sorted(tokens[order]), "each step wastes less"
    stranded = summary[summary.quantity == "leaf_share_of_kv_memory:stranded"].set_index("system").value
    assert (stranded[["paged_reserved/vllm2023", "paged/vllm2023"]] == 0).all()
    assert (stranded[["orca_oracle/vllm2023", "contiguous/vllm2023"]] > 0).all()
    assert set(summary.paper) == {"kvarena"}, "another load is not Fig 2"


def test_the_drawn_bar_is_the_true_one_under_other_names() -> None:
    drawn = as_drawn({"token_states": 96.0, "last_block_waste": 1.5, "free_blocks": 2.5})
    assert drawn["reservation"] == drawn["internal_fragmentation"] == 1.25
    assert drawn["external_fragmentation_and_others"] == 1.5
    assert sum(drawn.values()) == 100


@pytest.mark.parametrize(("source", "points"), [("table", 3), ("file", 2)])
def test_shares_are_near_the_published(
    summary_of: Callable[..., pd.DataFrame], shared: Callable, source: str, points: float
) -> None:
    lengths = [f"trace.path={shared('data/sharegpt_lengths.csv')}"] if source == "file" else []
    summary = summary_of("memory_waste", *lengths, "systems=[orca-max,orca-pow2,orca-oracle,paged]", "params.seeds=[0]")
    published = read_published(PUBLISHED)
    published = published[(published.figure == "fig2") & (published.paper == "pagedattention")]
    rows = beside_published(summary, published).dropna(subset=["published"])
    assert len(rows) == len(published) == len(rows.drop_duplicates(PUBLISHED_KEY))
    assert (rows.value - rows.published).abs().max() <= points
    drawn = summary[summary.quantity.str.startswith("share_of_kv_memory_as_drawn:")].set_index("quantity").value
    assert drawn["share_of_kv_memory_as_drawn:reservation"] == pytest.approx(1.045, abs=points)


def test_measured_the_figure_is_of_this_machine(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of(
        "memory_waste", "clock=measured", "device=cpu", "model=tiny-opt", "arrival.rate=200", "arrival.duration_s=0.1",
        "trace.max_tokens=96", "params.pool_bytes=524288", "systems=[orca-max,paged]",
    )  # fmt: skip
    assert set(summary.clock) == {"measured"}
    assert set(summary.evidence) == {"measured"}
    assert set(summary.system) == {"orca_max/numba", "paged/numba"}
    tokens = summary[summary.quantity == "share_of_kv_memory:token_states"].set_index("system").value
    assert tokens["paged/numba"] > tokens["orca_max/numba"]


def test_the_title_is_of_all_that_is_drawn(summary_of: Callable[..., pd.DataFrame]) -> None:
    one = summary_of("memory_waste", "arrival.duration_s=12", "params.window_s=[2,12]", "systems=[paged]")
    never = draw(one).axes
    assert "nobody waited" in never[1].get_title()
    assert "opt-13b sharegpt" in never[0].get_title()
    other = one.assign(setup="llama-13b sharegpt, 1 x a100-40gb", label=one.label + " [model=llama-13b]")
    titles = [axis.get_title() for axis in draw(pd.concat([one, other], ignore_index=True)).axes]
    assert [sum(name in title for title in titles) for name in ("opt-13b", "llama-13b")] == [2, 2]
