"""The waterfall: one change a step, paired by seed, and ratios that multiply to the whole."""

from collections.abc import Callable

import pandas as pd
import pytest

from kvarena.errors import UserError
from kvarena.experiments.command.compose import compose_run

SHORT = ("arrival.duration_s=60", "params.window_s=[20,60]", "params.capacity_duration_s=60", "params.tolerance=0.2")


def test_each_step_is_the_ratio_of_two_systems(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of("waterfall", *SHORT, "params.seeds=[3]", "params.limit_s=0.3")
    batch = summary[summary.quantity == "mean_batched_requests"].set_index("system").value
    names = ("orca_max", "orca_oracle", "contiguous", "paged_reserved-1", "paged-1")
    order = [f"{name}/vllm2023" for name in names]
    assert list(batch[order]) == sorted(batch[order])
    assert batch["paged/vllm2023"] < 1.02 * batch["paged-1/vllm2023"]
    assert batch["vattention-2MB/vllm2023"] < batch["paged/vllm2023"]
    ratios = summary[summary.quantity.str.startswith("batch_ratio:")].set_index("quantity").value
    steps = [f"batch_ratio:{name}" for name in ("estimate", "rounding", "stranding", "reservation")]
    assert ratios[steps].prod() == pytest.approx(batch["paged-1/vllm2023"] / batch["orca_max/vllm2023"])
    capacity = summary[summary.quantity == "capacity"].set_index("system").value
    assert capacity["orca_max/vllm2023"] < capacity["orca_oracle/vllm2023"] < capacity["paged/vllm2023"]


def test_each_step_changes_one_thing() -> None:
    """The chain of systems: what its names promise is in their configurations."""
    systems = {s.name: s for s in compose_run("experiment=waterfall").systems}
    allocators = {name: vars(s.allocator) for name, s in systems.items()}
    assert allocators["orca-max"] | {"name": "orca_oracle", "estimate": "oracle"} == allocators["orca-oracle"]
    assert allocators["paged-1"] | {"block_size": 16} == allocators["paged"]
    assert allocators["paged-reserved-1"]["block_size"] == allocators["paged-1"]["block_size"] == 1
    assert {allocators[name]["estimate"] for name in ("orca-oracle", "contiguous", "paged-reserved-1")} == {"oracle"}


def test_without_a_limit_there_is_no_search(summary_of: Callable[..., pd.DataFrame]) -> None:
    run = compose_run("experiment=waterfall", "clock=measured", "device=cpu")
    assert run.params.limit_s is None
    summary = summary_of(
        "waterfall", "clock=measured", "device=cpu", "model=tiny-opt", "params.seeds=[0]", "arrival.duration_s=0.06",
        "arrival.rate=200", "trace.max_tokens=64", "params.pool_bytes=262144", "systems=[orca-max,orca-oracle]",
    )  # fmt: skip
    assert "capacity" not in set(summary.quantity)
    assert set(summary.evidence) == {"measured"}


UNKNOWN = "params.steps=[{name: a, origin: orca-max, system: nothing}]"


@pytest.mark.parametrize(
    "override",
    ["params.seeds=[]", "params.seeds=[1,1]", "params.seeds=[-1]", "arrival.rate=0", "trace.seed=4", UNKNOWN],
)
def test_bad_seeds_and_rates_are_refused(finished: Callable, override: str) -> None:
    with pytest.raises(UserError):
        finished("waterfall", *SHORT, "systems=[orca-max]", override)


def test_a_search_that_is_not_asked_for_has_no_options() -> None:
    with pytest.raises(UserError, match="limit_s"):
        compose_run("experiment=waterfall", "clock=measured", "device=cpu", "params.guess=2")
