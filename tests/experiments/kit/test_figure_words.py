"""What a figure says: a paper's name and points only beside what earned them, and always what ran, by which clock."""

import pandas as pd
import pytest

from kvarena.experiments.kit.legend import shown_names
from kvarena.experiments.kit.panels import over_seeds, published_of, title
from kvarena.experiments.kit.plots import canvas
from kvarena.harness.record.summary import published_values

EARNED = {"paper": "pagedattention", "figure": "fig13a", "panel": "OPT-13B ShareGPT 2 req/s", "system": "vLLM"}
OURS = {"paper": "kvarena", "figure": "fig13a", "panel": "opt-13b own.csv", "system": "paged/vllm2023"}


def rows_of(names: dict[str, str], **more: object) -> pd.DataFrame:
    base = {"setup": "opt-13b sharegpt, 1 x a100-40gb", "label": "paged/vllm2023", "allocator": "paged", "x": 2.0,
            "quantity": "mean_batched_requests", "clock": "modelled", "evidence": "predicted"}  # fmt: skip
    return pd.DataFrame([{"value": 30.0, **base, **names, **more}])


def titled(rows: pd.DataFrame) -> str:
    _, (axis,) = canvas(1, 1, width=20)
    title(axis, rows, "what is drawn")
    return axis.get_title().replace("\n", " ")


@pytest.mark.parametrize(("clock", "evidence"), [("modelled", "calibrated"), ("measured", "measured")])
@pytest.mark.parametrize("names", [EARNED, OURS])
def test_a_title_says_what_ran_by_which_clock_and_on_what_evidence(names, clock, evidence):
    rows = rows_of(names, clock=clock, evidence=evidence)
    assert all(word in titled(rows) for word in ("opt-13b sharegpt", "a100-40gb", clock, evidence))


def test_a_papers_name_is_in_the_title_of_what_earned_it():
    assert "PagedAttention Fig 13a: OPT-13B ShareGPT 2 req/s" in titled(rows_of(EARNED))
    assert titled(rows_of(OURS)).startswith("what is drawn")
    assert "PagedAttention" not in titled(rows_of(OURS))


def test_published_points_stand_beside_what_earned_them():
    theirs = published_values("pagedattention", figure="fig13a", system="vLLM")
    (value,) = theirs[theirs.quantity == "mean_batched_requests"].value
    assert published_of(rows_of(EARNED)).value.tolist() == [value]
    assert published_of(rows_of(OURS | {"panel": EARNED["panel"], "system": "vLLM"})).empty


def test_beside_a_row_over_seeds_the_published_name_stands_for_seed_0_alone():
    drawn, alone = over_seeds(pd.concat([rows_of(OURS, value=29.0), rows_of(EARNED), rows_of(EARNED, x=3.0)]))
    assert (drawn.value.tolist(), drawn.x.tolist()) == ([29, 30], [2, 3])
    assert alone.paper.tolist() == ["pagedattention"]


def test_a_legend_tells_a_replayed_system_from_the_published_one():
    both = pd.concat([rows_of(EARNED), rows_of(OURS, label="vattention/vllm2023")])
    assert shown_names(both) == {"paged/vllm2023": "vLLM, replayed", "vattention/vllm2023": "vattention"}
