"""Figs 1 and 3 and Table 1: arithmetic, checked against the published numbers and by hand."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from kvarena.errors import UserError
from kvarena.experiments.command.compose import compose_run
from kvarena.experiments.pagedattention.memory_by_batch import attached_bytes, running_lengths
from kvarena.harness.paths import PUBLISHED
from kvarena.harness.record.summary import PUBLISHED_KEY, read_published
from kvarena.harness.requests.workload import Workload
from kvarena.harness.run.published import is_earned, named

LAYOUT = "experiment=memory_layout"


def test_published_numbers(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of("memory_layout")
    published = read_published(PUBLISHED)
    published = published[(published.paper == "pagedattention") & published.figure.isin(["fig1", "fig3", "table1"])]
    rows = published.merge(summary, on=PUBLISHED_KEY, how="left", suffixes=("_published", ""))
    assert rows.value.notna().all()
    error = (rows.value / rows.value_published - 1).abs()
    assert error[rows.figure == "fig3"].max() == 0
    assert error[rows.quantity == "max_kv_slots"].max() < 0.003
    assert error[rows.figure == "table1"].max() < 0.015
    assert error[rows.quantity == "memory_vs_batch"].max() < 0.05
    assert error[rows.quantity == "throughput_vs_batch"].max() < 0.2, "Fig 1 was a faster run than Fig 12"
    blocks = summary[summary.quantity == "kv_blocks_of_16"].set_index("model").value
    assert dict(blocks) == {"opt-13b": 984, "opt-66b": 605, "opt-175b": 3757}
    kinds = rows.drop_duplicates("quantity").set_index("quantity").evidence
    assert kinds["max_kv_slots"] == "calibrated"
    assert kinds["parameter_size"] == kinds["never_used_slots"] == "exact"
    assert set(summary[summary.allocator == "vattention"].paper) == {"kvarena"}, "the paper has no such system"


def test_another_model_wears_no_published_panel(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of("memory_layout", "trace.num_requests=200", "engine=lean", "model=llama-13b")
    of_device = summary[
        summary.quantity.isin(["memory_vs_batch", "throughput_vs_batch", "share_of_gpu_memory:parameters"])
    ]
    assert set(of_device.paper) == {"kvarena"}
    assert "table1" in set(summary.figure), "its servers are named, whatever the run's own"


@pytest.mark.parametrize(
    "overrides",
    [
        "trace.num_requests=200", "trace=alpaca", "trace.max_tokens=1024",
        "model=opt-13b model.dtype=float32 engine=lean device=a100-80gb", "device=h100 engine=lean", "engine=lean",
    ],
)  # fmt: skip
def test_whatever_changes_fig_1_loses_its_name(overrides: str) -> None:
    for ours, earns in (((), True), (overrides.split(), False)):
        run = compose_run(LAYOUT, *ours)
        assert is_earned(named(run, run.systems[1], "fig1", key="vLLM", x=8.9, half="memory")) == earns


def test_another_request_or_server_is_not_the_papers(summary_of: Callable[..., pd.DataFrame]) -> None:
    longer = "{name: request A, prompt_tokens: 9, output_tokens: 3, max_tokens: 2048}"
    server = "{model: opt-13b, tp: 1, device: a100-80gb}"
    summary = summary_of(
        "memory_layout", f"params.reservations=[{longer}]", f"params.servers=[{server}]", "trace.num_requests=50"
    )
    changed = summary[summary.quantity.isin(["never_used_slots", "max_kv_slots"])]
    assert set(changed.paper) == {"kvarena"}
    assert set(changed.evidence) == {"exact", "predicted"}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["params.servers=[{model: opt-66b, tp: 1, device: a100-40gb}]"], "122.4 GiB"),
        (["engine=lean", "device=a100-40gb", "device.memory_gib=4"], "weights do not fit, 23.9 GiB"),
        (
            ["params.servers=[{model: opt-13b, tp: 1, device: a100-40gb}, {model: opt-13b, tp: 1, device: a100-40gb}]"],
            "twice",
        ),
        (["params.throughput_batches=[0]"], "above 0"),
    ],
)
def test_what_cannot_be_is_refused(overrides: list[str], said: str, finished: Callable) -> None:
    with pytest.raises(UserError, match=said):
        finished("memory_layout", "trace.num_requests=10", *overrides)


def test_lengths_of_running_requests_by_hand() -> None:
    workload = Workload(np.array([2, 4]), np.array([3, 1]), np.zeros(2, np.int64))
    assert list(running_lengths(workload)) == [0, 0, 1, 1, 2]  # 2, 3, 4 of the one, 4 of the other


def test_what_a_system_attaches_by_length() -> None:
    run = compose_run(LAYOUT)
    by_name = {system.name: attached_bytes(run, system, 300) for system in run.systems}
    token = 819_200
    assert set(by_name["orca-max"][1:]) == {2048 * token}
    assert list(by_name["paged"][[1, 16, 17, 300]]) == [16 * token, 16 * token, 32 * token, 304 * token]
    slab = 80 * (2 << 20)  # one page-group in K and V of 40 layers; 204.8 tokens
    assert list(by_name["vattention-2mb"][[1, 204, 205]]) == [slab, slab, 2 * slab]


def test_a_reservation_that_does_not_fit_its_maximum_is_refused(finished: Callable) -> None:
    request = "{name: request A, prompt_tokens: 9, output_tokens: 3, max_tokens: 8}"
    with pytest.raises(UserError, match="request A"):
        finished("memory_layout", f"params.reservations=[{request}]", "trace.num_requests=10")


def test_measured_memory_grows_with_the_batch(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of(
        "memory_layout", "clock=measured", "device=cpu", "model=tiny-opt", "trace.num_requests=8",
        "trace.max_tokens=128", "params.pool_bytes=524288", "systems=[orca-max,paged]",
    )  # fmt: skip
    reserved = summary[(summary.quantity == "memory_vs_batch") & (summary.allocator == "orca_max")]
    steps = np.diff(reserved.value) / np.diff(reserved.x)
    assert len(reserved) > 1
    assert steps == pytest.approx(128 * 1024 / 1e9)  # a row of 128 tokens of 1 KiB, whatever the request


def test_every_device_maps_page_groups_of_its_own() -> None:
    run = compose_run("experiment=memory_layout", "systems=[vattention-2mb]", "model.tp=4", "engine=lean")
    assert attached_bytes(run, run.systems[0], 2)[1] == 4 * 2 * run.model.num_layers * 2 * 1024**2
