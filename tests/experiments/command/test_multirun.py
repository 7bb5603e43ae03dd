"""Which jobs of a multirun are one run, and what its systems are called."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from tiny import TINY

from kvarena.errors import UserError
from kvarena.experiments.command import multirun
from kvarena.experiments.command.cli import USER_ERROR, _command, guarded
from kvarena.experiments.command.compose import configuration
from kvarena.experiments.command.multirun import as_one, jobs_of
from kvarena.harness.run.run import Run

SMALL = ("experiment=memory_waste", *TINY["memory_waste", "modelled"])
MEASURED = ("experiment=memory_waste", "clock=measured", *TINY["memory_waste", "measured"])


def runs_of(*arguments: str) -> tuple[list[Run], list[list[str]]]:
    jobs = jobs_of(arguments)
    with configuration():
        return multirun.runs_within(jobs.across, jobs.within), jobs.within


def one_of(*arguments: str) -> Run | None:
    return as_one(*runs_of(*arguments))


def labels(*arguments: str) -> list[str]:
    run = one_of(*arguments)
    assert run is not None
    assert len({s.name for s in run.systems}) == len({s.label for s in run.systems}) == len(run.systems)
    return [system.shown_allocator for system in run.systems]


@pytest.mark.parametrize(
    ("arguments", "across", "within"),
    [
        (["a=1", "b=2,3"], ["a=1", "b=2,3"], []),
        (["a=1", "allocator=paged"], ["a=1", "allocator=paged"], []),
        (["trace.seed=0,1", "kernel=fa2,numba"], ["trace.seed=0,1"], [["kernel=fa2"], ["kernel=numba"]]),
        (["systems=[a,b],[c]"], [], [["systems=[a,b]"], ["systems=[c]"]]),
        (["allocator.block_size=range(8,25,8)", "allocator=paged"], [],
         [[f"allocator.block_size={n}", "allocator=paged"] for n in (8, 16, 24)]),
        (["allocator=choice(paged,static)", "x='a,b'"], ["x='a,b'"], [["allocator=paged"], ["allocator=static"]]),
        (["params.seeds=[0],[1]"], [], [["params.seeds=[0]"], ["params.seeds=[1]"]]),
        (["allocator=paged,static", "hydra/launcher=joblib"], ["allocator=paged,static", "hydra/launcher=joblib"], []),
        (["--config-dir=x", "allocator=paged,static"], ["allocator=paged,static"], []),
        (["allocator.watermark=interval(0,1)"], ["allocator.watermark=interval(0,1)"], []),
    ],
)  # fmt: skip
def test_what_is_swept_of_systems_is_within_a_job(
    arguments: list[str], across: list[str], within: list[list[str]]
) -> None:
    jobs = jobs_of(arguments)
    assert (jobs.across, jobs.within) == (across, within)


def test_every_job_is_told_by_its_own_overrides() -> None:
    assert list(jobs_of(["a=1,2", "kernel=x,y", "c=choice(3)"]).all) == [
        [f"a={a}", "c=3", f"kernel={k}"] for a in (1, 2) for k in "xy"
    ]


def test_what_is_no_override_is_refused() -> None:
    with pytest.raises(UserError, match="allocator"):
        jobs_of(["allocator=[paged"])


def test_one_run_has_the_systems_of_all_jobs_said_with_what_was_swept() -> None:
    """README's example: both sizes are named, the one of the file too."""
    sweep = ("systems=[vattention-numba]", "allocator=vattention", "allocator.page_group=64KB,2MB")
    assert labels(*MEASURED, *sweep) == ["vattention{page_group: 64KB}", "vattention{page_group: 2MB}"]
    assert labels(*SMALL, "allocator=paged", "allocator.block_size=8,16") == [
        "paged{block_size: 8}", "paged{block_size: 16}",
    ]  # fmt: skip
    assert labels(*SMALL, "allocator=paged,static") == ["paged", "static"]
    assert labels(*SMALL, "systems=[paged],[paged,static-numba]") == ["paged", "static"]
    assert labels(*SMALL, "systems=[paged]", "scheduler=vllm,orca") == [
        "paged [scheduler=vllm]",
        "paged [scheduler=orca]",
    ]
    assert labels(*SMALL, "systems=[paged,orca-max]", "scheduler.preemption=recompute,swap") == [
        "paged [preemption=recompute]", "orca_max", "paged [preemption=swap]",
    ]  # fmt: skip


def test_kernels_of_a_measured_sweep_are_one_run() -> None:
    run = one_of(*MEASURED, "allocator=paged", "kernel=numba,gather_sdpa")
    assert run is not None
    assert [s.label for s in run.systems] == ["paged/numba", "paged/gather_sdpa"]


def test_seeds_are_put_together() -> None:
    run = one_of(*SMALL, "params.seeds=[3],[0,1]", "systems=[paged]")
    assert run is not None
    assert run.params.seeds == [3, 0, 1]
    assert [s.name for s in run.systems] == ["paged"]


def test_a_run_that_is_alone_is_itself() -> None:
    runs, within = runs_of(*SMALL, "systems=[paged],[static-numba]")
    assert as_one(runs[:1], within[:1]) is runs[0]


def test_experiments_of_one_system_and_parameters_that_name_systems_keep_their_jobs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sweep = ("systems=[paged]", "allocator=paged", "allocator.block_size=8,16")
    assert one_of(*SMALL, *sweep) is not None
    tiny = (o for o in TINY["serving_latency", "modelled"] if not o.startswith("params.out_of_sample"))
    serving = ("experiment=serving_latency", *tiny)
    assert one_of(*serving, *sweep) is None, "params.out_of_sample names paged"
    monkeypatch.setattr("kvarena.experiments.command.registry.ONE_SYSTEM", ("memory_waste",))
    assert one_of(*SMALL, *sweep) is None


def start(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "kvarena", *arguments], text=True, capture_output=True, timeout=120,
        env=os.environ | {"KVARENA_RUNS": str(folder)},
    )  # fmt: skip


def test_a_measured_sweep_over_kernels_and_lengths_is_one_folder_of_two_jobs(tmp_path: Path) -> None:
    others = [each for each in MEASURED if not each.startswith("arrival.duration_s")]
    swept = ("allocator=paged", "kernel=numba,gather_sdpa", "arrival.duration_s=0.01,0.02")
    done = start(tmp_path, "-m", *others, *swept)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "memory_waste").glob("2*")
    summary = pd.read_csv(folder / "summary.csv")
    served = summary[summary.allocator == "paged"]
    assert set(served.system) == {
        f"paged/{kernel} [arrival.duration_s={duration}]"
        for kernel in ("numba", "gather_sdpa") for duration in (0.01, 0.02)
    }  # fmt: skip
    assert len(list((folder / "jobs").iterdir())) == 2
    assert done.stdout.count("one after the other") == 1
    assert done.stdout.count("results: ") == 1


def test_systems_that_cannot_be_one_run_are_measured_one_by_one(tmp_path: Path) -> None:
    sweep = ("allocator=static,paged", "kernel=numba,gather_sdpa")
    done = start(tmp_path, "-m", *MEASURED, *sweep)
    assert done.returncode == 2, "static + gather_sdpa fits nowhere"
    assert "static + gather_sdpa" in done.stderr
    assert "Traceback" not in done.stderr
    done = start(tmp_path, "-m", "experiment=memory_waste", "allocator=slab,paged")
    assert (done.returncode, "allocator=slab" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("override", "said"),
    [("systems=[paged/numba,", "cannot be read"), ("systems=[paged/numba],[static/numba]", "-m runs each")],
)
def test_what_hydra_would_refuse_is_refused_before(override, said, capsys):
    assert guarded(lambda: _command(["experiment=memory_waste", override])) == USER_ERROR
    assert said in capsys.readouterr().err
