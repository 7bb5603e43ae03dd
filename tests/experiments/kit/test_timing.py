"""What is timed and what is not: warm-up before the first sample, turns, and what a step's seconds are made of."""

from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from kvarena.experiments.command.compose import compose_run
from kvarena.experiments.kit import attention_time
from kvarena.experiments.kit.replay import Replayer, workload_of
from kvarena.experiments.vattention import prefill_cell
from kvarena.harness.engine import fixed_batch
from kvarena.harness.measured.stopwatch import Stopwatch

TINY = ("device=cpu", "model=tiny-llama")
DECODE = (
    *TINY, "systems=[static-numba,paged-numba]", "params.batch_sizes=[2]", "params.prompts=['40']", "params.rounds=4",
    "params.max_tokens=512", "params.steps_per_round=2", "params.warmup_steps=3", "params.check_steps=1",
)  # fmt: skip


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Callable[[type, str], list[object]]:
    """`calls(Class, "method")` is a list of those that the method is called on from now on."""

    def count_of(owner: type, name: str) -> list[object]:
        seen, method = list[object](), getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda self, *args: seen.append(self) or method(self, *args))
        return seen

    return count_of


def test_a_batch_is_warmed_up_and_a_step_timed_with_its_scheduling(
    finished: Callable[..., Path], calls: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that ticks whenever it is read: before, planned, executed, booked."""
    ticks, stepped = count(), calls(fixed_batch.FixedBatch, "step")
    monkeypatch.setattr(fixed_batch, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    steps = pd.read_parquet(finished("decode_throughput", *DECODE) / "steps.parquet")
    assert list(Counter(stepped).values()) == [1 + 3 + 4 * 2] * 2, "checked, warmed up, timed"
    assert len(steps) == 2 * 4 * 2
    assert (set(steps.step_s), set(steps.schedule_s)) == ({3}, {2})
    first = steps[steps.step == 0].groupby("round").system.first().tolist()
    assert first == ["static-numba", "paged-numba"] * 2, "nobody always comes first"


def test_an_iteration_is_timed_after_the_warm_up(finished: Callable[..., Path], calls: Callable) -> None:
    stepped = calls(fixed_batch.FixedBatch, "step")
    few = ("params.iterations=4", "params.max_batch=2", "params.prompt_tokens=60", "params.max_tokens=90",
           "params.warmup_steps=3", "params.check_steps=1", "params.rounds=1", "params.spike_ms=1")  # fmt: skip
    finished("allocation_overlap", *TINY, *few)
    assert list(Counter(stepped).values()) == [1 + 3 + 4] * 3


def test_prompts_are_fed_once_before_they_are_timed(finished: Callable[..., Path], calls: Callable) -> None:
    fed = calls(prefill_cell._Lane, "prefill")
    few = ("params.contexts=[16,32]", "params.rounds=2", "params.pool_bytes=1048576")
    folder = finished("prefill_throughput", *TINY, *few, "systems=[static-numba,paged-numba]")
    assert list(Counter(fed).values()) == [(2 + 1) * 2] * 2
    assert len(pd.read_parquet(folder / "samples.parquet")) == 2 * 2 * 2


def test_each_system_serves_two_short_requests_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    run = compose_run(
        "experiment=memory_waste", "clock=measured", "device=cpu", "model=tiny-opt", "arrival.duration_s=0.05",
        "arrival.rate=200", "trace.max_tokens=64", "params.pool_bytes=1048576", "systems=[orca-max,paged]",
    )  # fmt: skip
    served, serve = list[tuple[str, int]](), Replayer._serve
    monkeypatch.setattr(
        Replayer, "_serve",
        lambda self, system, workload, *args: served.append((system.name, len(workload)))
        or serve(self, system, workload, *args),
    )  # fmt: skip
    replayer, workload = Replayer(run), workload_of(run)
    for system in (*run.systems, run.systems[0]):
        replayer.serve(system, workload)
    whole = len(workload)
    assert [number for _, number in served] == [2, whole, 2, whole, whole], "and whoever is warm at once"


def test_a_calls_seconds_are_the_mean_of_all_calls_after_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Counter[int]()
    calls = [lambda n=n: made.update([n]) for n in range(4)]
    monkeypatch.setattr(attention_time, "seconds", lambda run, device: run() or 8.0)
    measure = attention_time.seconds_per_call(calls, torch.device("cpu"), in_graph=False)
    assert made == dict.fromkeys(range(4), 1), "warmed up"
    assert measure() == 8.0 / 4
    assert made == dict.fromkeys(range(4), 2)


def test_a_stopwatch_adds_up_the_times_of_one_name() -> None:
    watch = Stopwatch(torch.device("cpu"))
    for name, seconds in (("view", 1.0), ("append", 5.0), ("view", 2.0)):
        watch.add(name, seconds)
    assert watch.read() == {"view": 3, "append": 5}
    assert watch.read() == {}
