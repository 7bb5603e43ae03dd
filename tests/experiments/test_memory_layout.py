"""Figs 1 and 3 and Table 1: arithmetic, checked against the published numbers and by hand."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from kvarena.errors import UserError
from kvarena.experiments.compose import compose_run
from kvarena.experiments.memory_by_batch import attached_bytes, running_lengths
from kvarena.harness.paths import PUBLISHED
from kvarena.harness.summary import PUBLISHED_KEY, read_published
from kvarena.harness.workload import Workload

LAYOUT = "experiment=memory_layout"


def test_published_numbers(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of("memory_layout", "trace.num_requests=4000")
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
    blocks = summary[summary.quantity == "kv_blocks_of_16"].set_index("panel").value
    assert dict(blocks) == {"OPT-13B": 984, "OPT-66B": 605, "OPT-175B": 3757}


def test_another_model_wears_no_published_panel(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of("memory_layout", "trace.num_requests=200", "engine=lean", "model=llama-13b")
    assert set(summary.figure[summary.quantity == "memory_vs_batch"]) == {"memory_layout"}


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
