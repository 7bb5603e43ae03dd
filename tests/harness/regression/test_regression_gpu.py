"""Tier 3 of the gate, on faked measurements, and its suite on a CPU."""

import json

import pytest

from kvarena.errors import UserError
from kvarena.harness.regression import baseline, gpu
from kvarena.harness.regression.verdict import Status, Verdict
from kvarena.kernels.layout import Layout

HERE = {"gpu": "NVIDIA A100-SXM4-40GB", "driver": "560.35", "torch": "2.13.0"}
STEADY = gpu.Series([1.00, 1.01, 0.99, 1.00, 1.02], [1.00, 1.01, 1.00, 0.99, 1.00])
NOISY = gpu.Series([1.0] * 5, [1.1] * 5)  # A/A differ by 9.1 %: 27 % are allowed


def slowed(series: gpu.Series, factor: float) -> gpu.Series:
    return gpu.Series([factor * s for s in series.a], [factor * s for s in series.b])


def verdict(base: dict, head: dict) -> Verdict:
    [finding] = gpu.judge(base, head).findings
    return finding.verdict


@pytest.mark.parametrize(("factor", "expected"), [(1.0, "ok"), (1.04, "ok"), (1.07, "regressed"), (2.0, "regressed")])
def test_steady_times_may_be_5_percent_slower(factor, expected):
    assert verdict({"a": 1.0}, {"a": slowed(STEADY, factor)}) == expected


@pytest.mark.parametrize(("factor", "expected"), [(1.0, "ok"), (1.15, "ok"), (1.3, "regressed"), (2.0, "regressed")])
def test_noisy_times_may_be_three_times_their_noise_slower(factor, expected):
    assert verdict({"a": 1.0}, {"a": slowed(NOISY, factor)}) == expected


def test_vanished_benchmark_cannot_be_judged():
    assert verdict({"a": 1.0}, {}) is Verdict.UNJUDGEABLE


def test_kernel_that_the_baseline_lacks_is_new():
    assert verdict({}, {"a": STEADY}) is Verdict.NEW


@pytest.mark.parametrize(
    "series",
    [
        gpu.Series([], [], "OutOfMemoryError: ..."),
        gpu.Series([1.0] * 4, [1.0] * 5),
        gpu.Series([1.0] * 5, [1.0] * 4 + [float("nan")]),
    ],
    ids=["error", "too few", "nan"],
)
def test_what_is_not_measured_cannot_be_judged(series):
    outcome = gpu.judge({"a": 1.0}, {"a": series})
    assert outcome.status(required=False) is Status.UNJUDGEABLE


def test_broken_baseline_cannot_be_judged():
    assert verdict({"a": float("nan")}, {"a": STEADY}) is Verdict.UNJUDGEABLE


@pytest.mark.parametrize("key", ["gpu", "driver", "torch"])
def test_another_machine_is_refused(key):
    reason = gpu.refusal({**HERE, key: "another"}, HERE)
    assert f"{key} another there, {HERE[key]} here" in reason
    assert gpu.refusal(HERE, HERE) == ""


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with a GPU, whose times a test sets, and an empty folder of baselines."""
    state = {"here": HERE, "series": {"a": STEADY}}
    monkeypatch.setattr(baseline, "BASELINES", tmp_path)
    monkeypatch.setattr(gpu, "this_machine", lambda: state["here"])
    monkeypatch.setattr(gpu, "measure", lambda tree: state["series"])
    return state


def test_baseline_is_accepted_and_judged_against(machine, tmp_path):
    assert "no gpu-nvidia-a100-sxm4-40gb.json" in gpu.run().not_judged.replace("there is ", "").replace(
        f"{tmp_path.name}/", ""
    )
    gpu.accept("first")
    assert json.loads((tmp_path / "gpu-nvidia-a100-sxm4-40gb.json").read_text())["machine"] == HERE
    assert gpu.run().status(required=True) is Status.OK
    machine["series"] = {"a": slowed(STEADY, 2)}
    assert gpu.run().status(required=True) is Status.REGRESSED


def test_new_driver_is_not_judged(machine):
    gpu.accept("first")
    machine["here"] = {**HERE, "driver": "570.00"}
    outcome = gpu.run()
    assert outcome.not_judged == "Refused, the baseline is another machine's: driver 560.35 there, 570.00 here."
    assert outcome.status(required=True) is Status.UNJUDGEABLE


def test_without_a_gpu_it_is_not_judged(machine):
    machine["here"] = None
    assert gpu.run().not_judged.startswith("No GPU")
    with pytest.raises(UserError, match="no GPU"):
        gpu.accept("first")


def test_unusable_times_are_not_accepted(machine, tmp_path):
    machine["series"] = {"a": gpu.Series([], [], "OutOfMemoryError")}
    with pytest.raises(UserError, match="no usable times of a"):
        gpu.accept("first")
    assert not list(tmp_path.iterdir())


class FakeSide:
    """A process that compiles at its first sample."""

    benchmarks = ("a", "broken")

    def __init__(self, tree, suite):
        self._samples = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def sample(self, benchmark):
        self._samples += 1
        return "RuntimeError: no" if benchmark == "broken" else 99.0 if self._samples == 1 else 1.0


def test_first_samples_are_not_looked_at(monkeypatch):
    monkeypatch.setattr(gpu, "Side", FakeSide)
    series = gpu.measure("tree", rounds=5)
    assert series["a"] == gpu.Series([1.0] * 5, [1.0] * 5)
    assert series["broken"].error == "RuntimeError: no"


@pytest.mark.parametrize("layout", Layout)
def test_suite_runs_on_a_cpu_too(layout, monkeypatch):
    from kvarena.harness.regression import gpu_suite

    monkeypatch.setattr(gpu_suite, "TOKENS", 64)
    kernel = "sdpa" if layout is Layout.CONTIGUOUS else "gather_sdpa"
    gpu_suite.decode(kernel, layout, 16, device="cpu")()
    gpu_suite.append_kv(layout, device="cpu")()
    assert {name for name in gpu_suite.BENCHMARKS if "sdpa" in name} == {
        "decode attention, sdpa, contiguous",
        "decode attention, gather_sdpa, paged",
    }
