"""Fig 12: who maps when, what overlap hides, and the replay's iterations one by one."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from kvarena.allocators.policy import Admission
from kvarena.allocators.registry import make_policy
from kvarena.errors import UserError
from kvarena.experiments.command.compose import compose_run
from kvarena.experiments.kit.published_models import runs_by_model
from kvarena.experiments.vattention.allocation_overlap import _names, events, hidden_share
from kvarena.experiments.vattention.mapped_system import the_system
from kvarena.experiments.vattention.overlap_cell import Way, _prime, system_in
from kvarena.experiments.vattention.overlap_replay import decode_only, replayed
from kvarena.harness.files.content import sha256
from kvarena.harness.requests.request import Request
from kvarena.harness.trace import published_files

SMALL = (
    "experiment=allocation_overlap", "device=cpu", "model=tiny-llama", "params.iterations=30", "params.max_batch=2",
    "params.prompt_tokens=500", "params.max_tokens=600", "params.warmup_steps=1", "params.rounds=2",
    "params.spike_ms=1",
)  # fmt: skip
MODELLED = (
    "experiment=allocation_overlap", "clock=modelled", "params.iterations=300", "params.max_batch=4",
    "trace.num_requests=8", "trace.prompt_tokens=1950", "trace.output_tokens=250", "trace.range_ratio=0.02",
)  # fmt: skip


def in_figure(summary: pd.DataFrame, quantity: str) -> dict[str, float]:
    rows = summary[summary.quantity == quantity]
    return dict(zip(rows.label.str.removeprefix("vattention-").str.split("/").str[0], rows.value, strict=True))


def test_only_sync_maps_in_front_of_an_iteration(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of(*(s.removeprefix("experiment=") for s in SMALL))
    grown = 2 * 2 * 4  # rounds, sequences, tensors: 64 KB hold 512 tokens of tiny-llama, so each sequence grows once
    critical, background = (in_figure(summary, f"{kind}_driver_calls") for kind in ("critical", "background"))
    assert critical["sync"] == grown
    assert critical["overlapped"] == critical["premapped"] == 0
    assert background["overlapped"] == critical["sync"]
    assert background["sync"] == background["premapped"] == 0
    assert in_figure(summary, "iterations_after_mapping") == {"sync": 2, "overlapped": 0, "premapped": 0}
    assert len(summary[summary.quantity == "decode_iteration_latency_vs_iteration"]) == 3 * 30
    assert set(summary.evidence) == {"measured", "exact"}


def test_premapped_rows_never_grow() -> None:
    run = compose_run(*SMALL)
    policy = make_policy(system_in(Way.PREMAPPED, the_system(run)).allocator, run.model.kv_layout(), 1 << 21, 600)
    _prime(Way.PREMAPPED, run.params, rows=2)(policy)
    policy.drain()
    for i in range(2):
        assert policy.admit(Admission([Request(i, 500, 100)], 500)) is not None
        assert policy.tokens_until_growth(i) == 100
    assert policy.drain() == []


def steps_of(sync: list[float], overlapped: list[float], premapped: list[float], maps: set[int]) -> pd.DataFrame:
    latencies = {Way.SYNC: sync, Way.OVERLAPPED: overlapped, Way.PREMAPPED: premapped}
    return pd.DataFrame(
        {"round": 0, "iteration": i, "way": way, "latency_ms": ms, "actions": int(way is Way.SYNC and i in maps)}
        for way, column in latencies.items()
        for i, ms in enumerate(column)
    )


def test_what_overlap_does_in_the_iteration_before_counts() -> None:
    steps = steps_of([1, 1, 5, 1, 1, 7], [1, 2, 1, 1, 2, 1], [1] * 6, maps={2, 5})
    table = events(steps)
    assert table[Way.SYNC].tolist() == [6, 8]
    assert table[Way.OVERLAPPED].tolist() == [3, 3]
    share = hidden_share(table)
    assert share.median == pytest.approx(100 * (1 - 1 / 5))
    assert share.n == 2
    assert share.ci_low <= share.median <= share.ci_high


def test_an_event_in_the_first_iteration_has_none_before_it() -> None:
    assert len(events(steps_of([5, 1], [1, 1], [1, 1], maps={0}))) == 0


def test_without_a_cost_nothing_is_hidden() -> None:
    share = hidden_share(events(steps_of([1, 1, 1], [1, 1, 1], [1, 1, 1], maps={1})))
    assert np.isnan(share.median)


def test_iterations_that_only_decode_are_kept_one_by_one() -> None:
    log = pd.DataFrame(
        {"steps": [1, 1, 1], "duration_ps": [9e9, 10e9, 5e9], "decodes": [2, 2, 2], "prefills": [1, 0, 0],
         "stall_ps": [0, 0, 2e9], "actions": [4, 0, 1], "ahead": [0, 3, 0]}
    )  # fmt: skip
    each = decode_only(log, count=4)
    assert each.latency_ms.tolist() == [10, 5], "the first row prefills"
    assert (each.stall_ms.tolist(), each.ahead.tolist(), each.iteration.tolist()) == ([0, 2], [3, 0], [0, 1])
    assert len(decode_only(log, count=1)) == 1


@pytest.mark.parametrize(("sliced", "tensors"), [(False, 64), (True, 2)])
def test_a_page_group_is_a_call_in_every_tensor(sliced: bool, tensors: int) -> None:
    """K and V of 32 layers; with tensor slicing one K and one V over all of them."""
    run = compose_run(*MODELLED, "allocator=vattention", f"allocator.tensor_slicing={sliced}")
    cell = replayed(run)
    actions = cell["iterations"].groupby("way")[["actions", "ahead"]].sum()
    calls = cell["driver_calls"].set_index("way")
    assert calls.critical["sync"] == tensors * actions.actions["sync"] > 0
    assert calls.background["overlapped"] == tensors * actions.ahead["overlapped"] > 0


def test_modelled_sync_waits_for_the_published_calls(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of(*(s.removeprefix("experiment=") for s in MODELLED))
    wait = in_figure(summary, "wait_for_mapping")
    assert wait["sync"] == pytest.approx(64 * 40e-3), "K and V of 32 layers, 40 us each (Table 3)"
    assert wait["sync, GPUs in turn"] == pytest.approx(2 * wait["sync"])
    assert wait["overlapped"] == wait["premapped"] == 0
    assert in_figure(summary, "hidden_share") == {"overlapped": pytest.approx(100)}
    assert in_figure(summary, "iterations_after_mapping")["premapped"] == 0
    p50, longest = (in_figure(summary, f"decode_iteration_latency_{mark}") for mark in ("p50", "max"))
    assert longest["sync"] - p50["sync"] >= 2.5
    assert longest["overlapped"] == pytest.approx(longest["premapped"])
    assert set(summary.evidence) == {"conditional", "exact"}, "lengths are made up, and GPUs in turn assumed"
    assert set(summary.paper) == {"kvarena"}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("params.iterations=0", "at least 1"),
        ("params.max_tokens=520", "the longest sequence gets to"),
        ("systems=[paged-numba]", "one system with allocator vattention"),
        ("systems=[vattention-numba,vattention-sdpa]", "one system"),
    ],
)
def test_what_cannot_be_is_refused(override: str, said: str, summary_of: Callable[..., pd.DataFrame]) -> None:
    with pytest.raises(UserError, match=said):
        summary_of(*(s.removeprefix("experiment=") for s in SMALL), override)


@pytest.fixture
def listed(tmp_path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file that counts as the published requests."""
    path = tmp_path / "lengths.csv"
    path.write_text("prompt_tokens,output_tokens\n" + "".join(f"{1900 + i},{200 + i}\n" for i in range(8)))
    known = (sha256(path), "vattention_overlap")
    monkeypatch.setattr(published_files, "_listed", lambda: {known})
    return f"trace.path={path}"


def test_the_published_requests_earn_fig_12(summary_of: Callable[..., pd.DataFrame], listed: str) -> None:
    summary = summary_of("allocation_overlap", "clock=modelled", listed)
    fig12 = summary[summary.paper == "vattention"]
    assert set(fig12.panel) == {"Llama-3-8B"}
    assert set(fig12.system) == {"sync", "overlapped"}
    assert set(fig12.evidence) == {"predicted"}
    in_turn = summary[summary.label.str.contains("in turn")]
    assert set(in_turn.evidence) == {"conditional", "exact"}


@pytest.mark.parametrize(
    "changed",
    ["trace.num_requests=5", "params.max_batch=4", "params.iterations=100", "params.spike_ms=5",
     "model=llama-3-8b model.tp=1",
     "arrival=poisson", "device=h200 engine=lean", "allocator=vattention allocator.page_group=64KB",
     "scheduler=sarathi"],
)  # fmt: skip
def test_fig_12_is_earned_by_what_it_ran_with_alone(changed: str, listed: str) -> None:
    def papers(*overrides: str) -> set[str]:
        run = compose_run("experiment=allocation_overlap", "clock=modelled", listed, *overrides)
        [one] = runs_by_model(run, run.params.gpus)
        return {_names(one, way, "fig12")["paper"] for way in (Way.SYNC, Way.OVERLAPPED)}

    assert papers() == {"vattention"}
    assert papers(*changed.split()) == {"kvarena"}


@pytest.mark.parametrize("key", ["scheduler.max_seqs=3", "allocator=vattention allocator.overlap=false",
                                 "params.rounds=3",
                                 "params.prompt_tokens=30", "model.tp=1"])  # fmt: skip
def test_keys_that_the_ways_or_the_replay_set_are_refused(key: str) -> None:
    with pytest.raises(UserError):
        compose_run(*MODELLED, *key.split())
