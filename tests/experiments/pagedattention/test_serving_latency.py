"""Latency over rate: what a curve may be called, what is refused, what a killed sweep keeps."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kvarena.errors import UserError
from kvarena.experiments.command.compose import compose_run
from kvarena.experiments.kit.latency_curve import chosen_panels
from kvarena.experiments.kit.latency_error import log_errors, rms
from kvarena.experiments.pagedattention.serving_latency import HEADLINE
from kvarena.experiments.pagedattention.serving_panels import curves_of


def panel(*rates: float, duration_s: int = 30, device: str = "a100-40gb") -> str:
    """An override: the panel of Fig 12a, over so few seconds."""
    keys = f"trace: sharegpt, model: opt-13b, device: {device}, duration_s: {duration_s}"
    return f"params.panels={{fig12a: {{{keys}, rates: {{others: {list(rates)}}}}}}}"


BARE = ("params.crossing=[]", "params.out_of_sample=[]")
SYSTEMS = ("clock=modelled", "systems=[orca-oracle,paged]", *BARE)
TINY = (*SYSTEMS, panel(1.0))
WHOLE = (*SYSTEMS, panel(1.0, duration_s=3600))
OTHERS = "params.out_of_sample=[{figure: fig12a, engine: vllm2023_from_orca, systems: [paged]}]"


def test_a_curve_out_of_sample_is_predicted_and_stands_beside_the_calibrated_one(
    summary_of: Callable[..., pd.DataFrame],
) -> None:
    summary = summary_of("serving_latency", *WHOLE, OTHERS)
    own = summary[(summary.quantity == HEADLINE) & (summary.paper == "pagedattention")].set_index("system")
    other = summary[summary.quantity == f"{HEADLINE}:out_of_sample"].set_index("system")
    assert own.evidence.to_dict() == {"Orca(Oracle)": "calibrated", "vLLM": "calibrated"}
    assert set(own.figure) == {"fig12a"}
    assert other.evidence.to_dict() == {"paged/vllm2023_from_orca": "predicted"}
    assert set(other.paper) == {"kvarena"}
    assert other.value.iloc[0] != own.value["vLLM"]
    errors = summary[summary.quantity == "rms_log_error"].set_index("system")
    assert errors.evidence.to_dict() == {
        "Orca/vllm2023": "calibrated",
        "vLLM/vllm2023": "calibrated",
        "all systems/vllm2023": "calibrated",
        "vLLM/vllm2023_from_orca": "predicted",
    }


def test_an_engine_run_by_itself_is_ours_and_predicted_where_it_was_not_fitted(
    summary_of: Callable[..., pd.DataFrame],
) -> None:
    summary = summary_of("serving_latency", *WHOLE, "engine=vllm2023_from_orca")
    assert set(summary.paper) == {"kvarena"}
    own = summary[summary.quantity == HEADLINE].set_index("allocator")
    assert own.evidence.to_dict() == {"orca_oracle": "calibrated", "paged": "predicted"}
    assert "rms_log_error" not in set(summary.quantity)


FIGURES = {
    "fig12a": "OPT-13B ShareGPT", "fig12b": "OPT-66B ShareGPT", "fig12c": "OPT-175B ShareGPT",
    "fig12d": "OPT-13B Alpaca", "fig12e": "OPT-66B Alpaca", "fig12f": "OPT-175B Alpaca",
}  # fmt: skip
THEIRS = {"FasterTransformer", "Orca(Max)", "Orca(Pow2)", "Orca(Oracle)", "vLLM"}


def earned(*overrides: str, seed: int = 0) -> pd.DataFrame:
    """Names of a point at 1 request/s of every curve of a run, where they are published."""
    run = compose_run("experiment=serving_latency", "clock=modelled", *overrides)
    curves = curves_of(run, chosen_panels(run.params.panels, run.params.only))
    names = pd.DataFrame([curve.published(seed, 1.0) for curve in curves if not curve.out_of_sample])
    return names[names.paper == "pagedattention"]


def test_by_default_all_five_systems_of_all_six_figures_are_the_papers() -> None:
    names = earned()
    assert dict(zip(names.figure, names.panel, strict=True)) == FIGURES
    assert names.groupby("figure").system.agg(set).eq(THEIRS).all()
    assert set(names.evidence[names.figure < "fig12d"]) == {"calibrated"}
    assert set(names.evidence[names.figure >= "fig12d"]) == {"predicted"}, "nothing was fitted to Alpaca"


@pytest.mark.parametrize(
    "override",
    [
        "engine=lean",
        "trace.filter=none",
        "trace.max_tokens=1024",
        "arrival.quantum_s=0.02",
        "arrival=poisson",
        "decoding=parallel",
        "params.pool_bytes=1000000000",
        "params.tolerance=0.1",
        "scheduler.token_budget=2300",
        "scheduler=vllm_v1",
        panel(1.0),
        panel(1.0, duration_s=3600, device="a100-80gb"),
    ],
)
def test_whatever_changes_a_point_takes_its_name(override: str) -> None:
    engine = ("engine=lean",) if "80gb" in override or "vllm_v1" in override else ()
    assert earned("params.only=[fig12a]", "systems=[paged]", override, *engine).empty
    assert len(earned("params.only=[fig12a]", "systems=[paged]")) == 1


def test_a_point_of_another_seed_or_batch_is_ours() -> None:
    assert earned("params.only=[fig12a]", seed=1).empty
    keys = "trace: sharegpt, model: opt-13b, device: a100-40gb, duration_s: 3600, rates: {others: [1.0]}"
    sized = f"params.panels={{fig12a: {{{keys}, batch_size: 5}}}}"
    assert set(earned(sized).system) == THEIRS - {"FasterTransformer"}


def test_seeds_are_paired_and_the_papers_row_is_seed_0s_alone(summary_of: Callable[..., pd.DataFrame]) -> None:
    six = ("params.seeds=[0,1,2,3,4,5]", "systems=[orca-max,paged,vattention-2mb]", "params.once=[vattention-2mb]")
    summary = summary_of("serving_latency", *WHOLE, panel(0.2, duration_s=3600), *six)
    points = summary[summary.quantity == HEADLINE].set_index("label")
    theirs, ours = (points[points.paper == paper] for paper in ("pagedattention", "kvarena"))
    assert dict(zip(theirs.index, theirs.n, strict=True)) == {"orca_max/vllm2023": 1, "paged/vllm2023": 1}
    assert ours.n.to_dict() == {"orca_max/vllm2023": 6, "paged/vllm2023": 6, "vattention-2MB/vllm2023": 1}
    of_six = ours[ours.n == 6]
    assert (of_six.ci_low < of_six.value).all()
    assert (of_six.value < of_six.ci_high).all()
    assert (theirs.value.between(of_six.ci_low, of_six.ci_high)).all()
    assert ours.ci_low["vattention-2MB/vllm2023"] != ours.ci_low["vattention-2MB/vllm2023"], "one seed has no interval"
    alone = summary_of("serving_latency", *WHOLE, panel(0.2, duration_s=3600), "systems=[orca-max]")
    alone = alone[(alone.quantity == HEADLINE) & (alone.paper == "pagedattention")]
    assert alone.value.item() == theirs.value["orca_max/vllm2023"]


def test_a_crossing_lies_on_the_line_between_the_two_rates_around_it(finished: Callable[..., Path]) -> None:
    keys = "trace: sharegpt, model: opt-13b, device: a100-40gb, duration_s: 300"
    folder = finished("serving_latency", "clock=modelled", "systems=[contiguous]", f"params.panels={{a: {{{keys}}}}}")
    points = pd.read_parquet(folder / "points.parquet")
    low, high = points[points.kind == "bracket"][["rate", "normalized_latency_s"]].sort_values("rate").to_numpy()
    assert low[1] <= 0.5 < high[1]
    assert high[0] <= 1.01 * low[0]
    summary = pd.read_csv(folder / "summary.csv")
    found = summary[summary.quantity == "rate_at_0.5_s_per_token"].value.item()
    share = np.log(found / low[0]) / np.log(high[0] / low[0])
    assert low[1] * (high[1] / low[1]) ** share == pytest.approx(0.5)
    drawn = summary[summary.quantity == HEADLINE]
    assert len(drawn) == 6, "a system without rates is drawn around its crossing"
    assert drawn.x.max() / found == pytest.approx(1.03, rel=0.01)


@pytest.mark.parametrize("system", ["vattention-2mb", "contiguous", "fastertransformer", "orca-max"])
def test_a_system_runs_alone_with_curves_out_of_sample(system: str, summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of("serving_latency", panel(0.5), f"systems=[{system}]", "params.crossing=[]")
    assert set(summary.paper) == {"kvarena"}
    assert summary.setup.nunique() == 1


def test_another_device_is_ours_and_its_published_system_says_so(summary_of: Callable[..., pd.DataFrame]) -> None:
    h200 = panel(1.0, device="h200")
    summary = summary_of("serving_latency", "engine=lean", h200, "systems=[paged]", "params.crossing=[]")
    assert set(summary.paper) == {"kvarena"}
    assert set(summary.setup) == {"opt-13b sharegpt, 1 x h200"}
    assert set(summary.label) == {"paged (as vLLM)"}


def test_panels_of_one_setup_are_told_apart(summary_of: Callable[..., pd.DataFrame]) -> None:
    keys = "trace: sharegpt, model: opt-13b, device: a100-40gb, rates: {others: [1.0]}, duration_s"
    two = f"params.panels={{a: {{{keys}: 30}}, b: {{{keys}: 60}}}}"
    summary = summary_of("serving_latency", *SYSTEMS, two)
    assert set(summary.setup) == {f"opt-13b sharegpt, {each}, 1 x a100-40gb" for each in "ab"}


def test_the_nearer_of_two_published_points_counts() -> None:
    points = pd.DataFrame({"panel": "OPT-13B ShareGPT", "system": "vLLM", "x": [1.5, 1.75], "value": [0.0487, 0.2]})
    errors = log_errors(points, "fig12a")
    assert errors[0] == 0, "0.0424 and 0.0487 are drawn at 1.5"
    assert rms(errors[:1]) == 0
    assert rms(errors) == pytest.approx(100 * abs(errors[1]) / 2**0.5)


def test_requests_that_could_never_run_are_counted(summary_of: Callable[..., pd.DataFrame]) -> None:
    tokens = 1024  # in the pool: longer requests can never fit
    summary = summary_of("serving_latency", *TINY, f"params.pool_bytes={tokens * 819_200}")
    counts = summary[summary.label == "paged/vllm2023"].set_index("quantity").value
    assert counts["refused_vs_rate"] > 0
    assert counts["finished_vs_rate"] > 0


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (panel(0.0), r"rates.others=0.0"),
        (panel(-1.0), r"rates.others=-1.0: must be"),
        (panel(0.001), "no request arrives within"),
        ("params.only=[fig12x]", "'fig12x'.*fig12a"),
    ],
)
def test_what_cannot_be_is_refused(override: str, said: str, finished: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=said):
        finished("serving_latency", *TINY, override)


def start(folder: Path) -> "subprocess.Popen[str]":
    """A sweep of two jobs."""
    quanta = "arrival.quantum_s=0.01,0.02"
    sweep = ("experiment=serving_latency", "-m", quanta, *SYSTEMS[:-1], panel(1.0, 1.5, duration_s=900))
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "kvarena", *sweep], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"KVARENA_RUNS": str(folder)},
    )  # fmt: skip


def test_a_killed_sweep_continues_and_measures_no_job_twice(tmp_path: Path) -> None:
    process = start(tmp_path)
    finished = tmp_path / "serving_latency" / ".unfinished"
    while process.poll() is None and not list(finished.glob("sweep-*/job-????????????/summary.csv")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it must be killed between its two jobs"
    output, error = start(tmp_path).communicate(timeout=120)
    assert error.count("already measured by this sweep") == 1, error
    assert output.count("results: ") == 1
    (folder,) = (tmp_path / "serving_latency").glob("2*")
    assert len(list((folder / "jobs").iterdir())) == 2
    assert not list(finished.glob("*"))
