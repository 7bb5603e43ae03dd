"""A run from its measurement to its folder, and summaries made again of what a folder holds."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from kvarena.errors import UserError
from kvarena.experiments import allocation_bandwidth
from kvarena.experiments.carry_out import carry_out, resolved_in, summarize
from kvarena.experiments.compose import compose_run
from kvarena.harness.record import Recorder

QUICK = ("experiment=allocation_bandwidth", "device=cpu", "params.page_groups=[64KB]", "params.pool=1MB",
         "params.run_groups=2", "params.rounds=6")  # fmt: skip


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    monkeypatch.setenv("KVARENA_RUNS", str(tmp_path))
    return Recorder("allocation_bandwidth", compose_run(*QUICK).plain())


def test_a_fault_in_the_summary_loses_nothing_and_mended_code_makes_it(
    recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(*_: object) -> pd.DataFrame:
        raise ZeroDivisionError

    run = compose_run(*QUICK)
    with monkeypatch.context() as broken:
        broken.setattr(allocation_bandwidth, "summarize", faulty)
        with pytest.raises(ZeroDivisionError):
            carry_out(run, recorder)
    (folder,) = tmp_path.glob("allocation_bandwidth/.unfinished/*-measured")
    summarize(folder)
    rates = pd.read_parquet(folder / "samples.parquet").gb_per_s
    assert pd.read_csv(folder / "summary.csv").value.iloc[0] <= rates.max()
    assert (folder / "figure.svg").is_file()


def test_a_run_of_another_machines_gpu_keeps_its_name(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = recorder.finish(carry_out(compose_run(*QUICK), recorder))
    assert resolved_in(folder).device_name == "cpu"
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("name: cpu\n  kind: cpu", "name: cuda\n  kind: cuda"))
    record = json.loads((folder / "provenance.json").read_text())
    record["machine"]["gpu"] = "NVIDIA H200"
    (folder / "provenance.json").write_text(json.dumps(record))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    assert resolved_in(folder).device_name == "nvidia-h200"


def test_folders_that_are_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config\.yaml"):
        summarize(tmp_path)
    (tmp_path / "config.yaml").write_text("arguments: [a=1]\njobs: {}\n")  # a sweep's: its jobs are runs
    with pytest.raises(UserError, match=str(tmp_path)):
        summarize(tmp_path)
