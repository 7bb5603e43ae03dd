"""Fig 13: page-groups that each way maps, prices of the driver's calls, and what is refused."""

from collections.abc import Callable

import pandas as pd
import pytest

from kvarena.errors import UserError
from kvarena.experiments.command.compose import compose_run
from kvarena.experiments.kit.published_models import runs_by_model
from kvarena.experiments.vattention.deferred_reclamation import WAYS, _names

SMALL = (
    "deferred_reclamation", "device=cpu", "model=tiny-llama", "params.prompt_tokens=1500", "params.pool_bytes=33554432",
    "params.rounds=1",
)  # fmt: skip
MODELLED = ("deferred_reclamation", "clock=modelled", "params.gpus={yi-6b: 1}")


def by_way(summary: pd.DataFrame, quantity: str) -> dict[str, float]:
    rows = summary[summary.quantity == quantity]
    return dict(zip(rows.label.str.split("/").str[0], rows.value, strict=True))


def test_each_way_maps_what_it_lacks(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of(*SMALL)
    assert by_way(summary, "page_groups_per_tensor") == {  # 512 tokens in 64 KB
        "no VMM calls": 0, "64KB sync": 3 + 1, "2MB sync": 1 + 1, "deferred reclamation": 0,
        "64KB, inherited whole": 0, "64KB, inherited half": 1, "64KB, reclaimed at once": 3 + 3,
        "64KB, one group ahead": 2 + 1,
    }, "and unmaps the one of the request in between, where there is one"  # fmt: skip
    assert set(summary[summary.unit == "s"].quantity) == {"prefill_time_1500_prompt"}
    assert (summary[summary.unit == "s"].value > 0).all()
    assert by_way(summary, "mapping_time")["64KB sync"] > by_way(summary, "mapping_time")["64KB, inherited whole"]


def test_modelled_prefills_wait_for_the_published_calls(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of(*MODELLED)
    mapping = by_way(summary, "mapping_time")
    assert mapping["64KB sync"] == pytest.approx(256 * 64 * 8e-3), "256 page-groups in 64 tensors, 8 us each"
    assert mapping["2MB sync"] == pytest.approx(8 * 64 * 40e-3)
    assert mapping["no VMM calls"] == mapping["deferred reclamation"] == mapping["64KB, inherited whole"] == 0
    one_less = mapping["64KB sync"] - 64 * (8e-3 - 2e-3)  # and the request before gives its own back
    assert mapping["64KB, one group ahead"] == pytest.approx(one_less)
    assert 0 < mapping["64KB, inherited half"] < mapping["64KB, one group ahead"] < mapping["64KB, reclaimed at once"]
    seconds = by_way(summary, "prefill_time_16K_prompt")
    plain = seconds["no VMM calls"]
    for way, ratio in by_way(summary, "prefill_time_over_no_vmm_calls").items():
        assert ratio == pytest.approx(seconds[way] / plain)
        assert seconds[way] == pytest.approx(plain + mapping[way] / 1e3)
    fig13 = summary[summary.paper == "vattention"]
    assert set(fig13.panel) == {"Yi-6B"}
    assert set(fig13.system) == {"no VMM calls", "64KB sync", "2MB sync", "deferred reclamation"}
    assert set(summary.evidence) == {"predicted", "exact"}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("params.rounds=0", "at least 1"),
        ("params.prompt_tokens=0", "at least 1"),
        ("systems=[paged-numba]", "one system with allocator vattention"),
    ],
)
def test_what_cannot_be_is_refused(override: str, said: str, summary_of: Callable[..., pd.DataFrame]) -> None:
    with pytest.raises(UserError, match=said):
        summary_of(*SMALL, override)


@pytest.mark.parametrize(
    "changed",
    ["model.dtype=float32", "model.tp=2", "device=h200 engine=lean", "params.prompt_tokens=8192",
     "params.pool_bytes=9000000000",
     "scheduler.token_budget=4000", "allocator=vattention allocator.tensor_slicing=true"],
)  # fmt: skip
def test_fig_13_is_earned_by_what_it_ran_with_alone(changed: str) -> None:
    def papers(*overrides: str) -> set[str]:
        run = compose_run("experiment=deferred_reclamation", "clock=modelled", "model=yi-6b", *overrides)
        [one] = runs_by_model(run, run.params.gpus)
        return {_names(one, way, "fig13")["paper"] for way in WAYS[:4]}

    assert papers() == {"vattention"}
    assert papers(*changed.split()) == {"kvarena"}
