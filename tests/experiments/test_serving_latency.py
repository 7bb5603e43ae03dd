"""Latency over rate: which constants a curve may be called fitted to, what is refused, what a killed sweep keeps."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from kvarena.errors import UserError
from kvarena.experiments.latency_error import log_errors, rms
from kvarena.experiments.serving_latency import HEADLINE
from kvarena.harness.config import load, typed
from kvarena.harness.engine_config import EngineConfig
from kvarena.harness.schemas import of


def panel(*rates: float, duration_s: int = 30) -> str:
    """An override: the panel of Fig 12a, over so few seconds."""
    keys = f"trace: sharegpt, model: opt-13b, device: a100-40gb, duration_s: {duration_s}"
    return f"params.panels={{fig12a: {{{keys}, rates: {{others: {list(rates)}}}}}}}"


SYSTEMS = ("clock=modelled", "systems=[orca-oracle,paged]", "params.crossing=[]", "params.out_of_sample=[]")
TINY = (*SYSTEMS, panel(1.0))
OTHERS = "params.out_of_sample=[{figure: fig12a, engine: vllm2023_from_orca, systems: [paged]}]"


def test_a_curve_out_of_sample_is_predicted_and_stands_beside_the_calibrated_one(
    summary_of: Callable[..., pd.DataFrame],
) -> None:
    summary = summary_of("serving_latency", *TINY, OTHERS)
    own = summary[summary.quantity == HEADLINE].set_index("system")
    other = summary[summary.quantity == f"{HEADLINE}:out_of_sample"].set_index("system")
    assert own.evidence.to_dict() == {"Orca(Oracle)": "calibrated", "vLLM": "calibrated"}
    assert other.evidence.to_dict() == {"vLLM": "predicted"}
    assert other.kernel.to_dict() == {"vLLM": "vllm2023_from_orca"}
    assert other.value["vLLM"] != own.value["vLLM"]
    errors = summary[summary.quantity == "rms_log_error"].set_index(["kernel", "system"])
    assert errors.evidence.to_dict() == {
        ("vllm2023", "Orca"): "calibrated",
        ("vllm2023", "vLLM"): "calibrated",
        ("vllm2023", "all systems"): "calibrated",
        ("vllm2023_from_orca", "vLLM"): "predicted",
    }


def test_an_engine_run_by_itself_is_predicted_where_it_was_not_fitted(summary_of: Callable[..., pd.DataFrame]) -> None:
    summary = summary_of("serving_latency", *TINY, "engine=vllm2023_from_orca")
    own = summary[summary.quantity == HEADLINE].set_index("system")
    assert own.evidence.to_dict() == {"Orca(Oracle)": "calibrated", "vLLM": "predicted"}


@pytest.mark.parametrize(
    ("point", "evidence"),
    [
        (("fig12b", "OPT-66B ShareGPT", "Orca(Max)", 0.1), "calibrated"),
        (("fig12c", "OPT-175B ShareGPT", "FasterTransformer"), "calibrated"),
        (("fig12d", "OPT-13B Alpaca", "vLLM", 24.0), "predicted"),
        (("fig12a", "OPT-13B ShareGPT", "vAttention/2MB", 1.0), "predicted"),
    ],
)
def test_the_engine_was_fitted_to_the_papers_own_curves_of_sharegpt(point: tuple[str, str, str], evidence: str) -> None:
    engine: EngineConfig = typed(of("engine", "vllm2023"), load("engine", "vllm2023"), "engine")
    assert engine.evidence(*point) == evidence


def test_the_nearer_of_two_published_points_counts() -> None:
    points = pd.DataFrame({"panel": "OPT-13B ShareGPT", "system": "vLLM", "x": [1.5, 1.75], "value": [0.0487, 0.2]})
    errors = log_errors(points, "fig12a")
    assert errors[0] == 0, "0.0424 and 0.0487 are drawn at 1.5"
    assert rms(errors[:1]) == 0
    assert rms(errors) == pytest.approx(100 * abs(errors[1]) / 2**0.5)


def test_requests_that_could_never_run_are_counted(summary_of: Callable[..., pd.DataFrame]) -> None:
    tokens = 1024  # in the pool: longer requests can never fit
    summary = summary_of("serving_latency", *TINY, f"params.pool_bytes={tokens * 819_200}")
    counts = summary[summary.system == "vLLM"].set_index("quantity").value
    assert counts["refused_vs_rate"] > 0
    assert counts["finished_vs_rate"] > 0


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (panel(0.0), r"arrival.rate=0.0: must be a number above 0"),
        (panel(-1.0), r"arrival.rate=-1.0: must be"),
        (panel(0.001), "no request arrives within"),
        ("params.only=[fig12x]", "no panel is called 'fig12x'. There are: fig12a"),
    ],
)
def test_what_cannot_be_is_refused(override: str, said: str, finished: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=said):
        finished("serving_latency", *TINY, override)


def start(folder: Path) -> "subprocess.Popen[str]":
    """A sweep of two jobs."""
    quanta = "arrival.quantum_s=0.01,0.02"
    sweep = ("experiment=serving_latency", "-m", quanta, *SYSTEMS, panel(1.0, 1.5, duration_s=900))
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
