"""Table 3, Table 9 and Fig 4 of vAttention: small runs on the host's driver, and on the fake of CUDA's."""

import contextlib
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from kvarena.allocators.sizes import KB, MB
from kvarena.allocators.vmm.host import HostDriver
from kvarena.errors import UserError
from kvarena.experiments.command.carry_out import carry_out, summarize
from kvarena.experiments.command.compose import compose_run
from kvarena.experiments.vattention import allocation_bandwidth, driver_samples, vmm_api_latency
from kvarena.experiments.vattention.decode_need import decode_need, need_rows
from kvarena.experiments.vattention.driver_calls import SYSTEM_CALLS, computing, timed_us
from kvarena.harness.modelled.device_model import DeviceConfig
from kvarena.harness.paths import PUBLISHED
from kvarena.harness.record.record import Recorder
from kvarena.harness.record.summary import COLUMNS, beside_published, read_published
from kvarena.harness.run.published import is_earned, named
from kvarena.harness.run.run import Run

LATENCY = (
    "experiment=vmm_api_latency", "device=cpu", "params.page_groups=[64KB,2MB]", "params.mapped=[10]",
    "params.created=[5]", "params.runs=[1,8]", "params.rounds=6", "params.calls=2",
)  # fmt: skip
BANDWIDTH = (
    "experiment=allocation_bandwidth", "device=cpu", "params.page_groups=[64KB,2MB]", "params.pool=4MB",
    "params.run_groups=2", "params.rounds=6",
)  # fmt: skip


A100 = "NVIDIA A100-SXM4-80GB"


def written(run: Run, runs: Path) -> pd.DataFrame:
    """Run, write; returns the summary that was written, and that its frames give again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVARENA_RUNS", str(runs))
        recorder = Recorder(run.experiment, run.plain())
        folder = recorder.finish(carry_out(run, recorder))
    assert (folder / "figure.png").stat().st_size > 0
    before = (folder / "summary.csv").read_bytes()
    if run.device.name != "cuda":  # whose configuration is that of the GPU that is here
        summarize(folder)
        assert (folder / "summary.csv").read_bytes() == before
    return pd.read_csv(folder / "summary.csv")


@pytest.fixture(scope="module")
def latency(tmp_path_factory) -> pd.DataFrame:
    return written(compose_run(*LATENCY), tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def bandwidth(tmp_path_factory) -> pd.DataFrame:
    return written(compose_run(*BANDWIDTH), tmp_path_factory.mktemp("runs"))


@pytest.fixture
def on_the_fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Run on a GPU that is not there."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "allocators")
    import fake_cuda

    for module in (driver_samples, allocation_bandwidth):
        monkeypatch.setattr(module, "make_driver", lambda device, size: fake_cuda.FakedCudaDriver(size))
    monkeypatch.setattr(vmm_api_latency, "lasting_context", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(driver_samples, "computing", lambda device: contextlib.nullcontext(lambda: None))

    def measured(*overrides: str, name: str = A100) -> pd.DataFrame:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
        run = replace(compose_run(*overrides), device=DeviceConfig(name="cuda", kind="cuda"))
        return written(run, tmp_path)

    return measured


def published(summary: pd.DataFrame) -> pd.DataFrame:
    """Our rows that have a published one."""
    return beside_published(summary, read_published(PUBLISHED)).dropna(subset=["published"])


# ---- vmm_api_latency -------------------------------------------------------------------------------------------


def test_every_call_is_measured_by_page_group_and_along_every_sweep(latency):
    summary = latency
    assert list(summary.columns) == COLUMNS
    assert (summary.value > 0).all()
    assert (summary[summary.quantity != "api_latency_floor"].n == 6).all()  # the floor is taken with every size
    assert set(summary.unit) == {"us"}
    table3 = summary[summary.quantity == "api_latency"]
    assert set(table3.panel) == {"64KB, 1 x cpu", "2MB, 1 x cpu"}
    assert table3.groupby("panel").system.apply(set).tolist() == [set(SYSTEM_CALLS["cpu"].values())] * 2
    points = summary.groupby("quantity").x.apply(lambda x: sorted(set(x.dropna())))
    assert points["api_latency_vs_mapped"] == [0, 10]
    assert points["api_latency_vs_created"] == [1, 5]
    assert points["api_latency_per_page_group_vs_run"] == [1, 8]
    assert len(summary[summary.quantity == "api_latency_beside_kernels"]) == len(table3)
    floor = summary[summary.quantity == "api_latency_floor"]
    assert len(floor) == 1
    assert floor.value.item() < table3.value.max()


def test_the_hosts_calls_do_not_wear_the_papers_names(latency):
    assert published(latency).empty
    assert set(latency.paper) == {"kvarena"}


def test_on_a_gpu_every_call_of_table_3_stands_beside_the_published_one(on_the_fake):
    summary = on_the_fake(*LATENCY, "params.page_groups=[2MB,4MB]")
    rows = published(summary)
    assert set(rows.panel) == {"2MB"}
    assert set(rows.system) == set(SYSTEM_CALLS["cuda"].values())
    assert set(summary.device) == {"nvidia-a100-sxm4-80gb"}
    assert set(summary[summary.paper == "vattention"].panel) == {"2MB"}, "Table 3 has no page-groups of 4 MB"
    run_rows = summary[summary.quantity == "api_latency_per_page_group_vs_run"]
    assert set(run_rows.system) == {"cuMemMap", "cuMemSetAccess", "cuMemUnmap"}


def test_another_gpu_earns_no_number_of_an_a100(on_the_fake):
    summary = on_the_fake(*LATENCY, "params.page_groups=[2MB]", name="NVIDIA H200")
    assert set(summary.paper) == {"kvarena"}
    assert set(summary.label) == {*SYSTEM_CALLS["cuda"].values(), "a call that does nothing"}


def test_every_call_on_a_gpu_is_one_of_table_3():
    theirs = read_published(PUBLISHED)
    assert set(SYSTEM_CALLS["cuda"].values()) <= set(theirs[theirs.figure == "table3"].system)


def test_only_the_calls_in_question_are_timed():
    driver = HostDriver(64 * KB)
    base, handles = driver.reserve(128 * KB), driver.create(2)
    taken = timed_us(driver, lambda: driver.map(base, 0, handles[::-1]))
    assert list(taken) == ["map"]
    assert taken["map"] == driver.calls["map"].ns / 1e3  # both system calls of the one call
    assert list(timed_us(driver, lambda: driver.unmap(base, 0, 2))) == ["unmap"]
    driver.close()


def test_a_cpu_computes_only_as_long_as_it_is_asked_to():
    with computing("cpu") as top_up:
        top_up()
    with pytest.raises(ZeroDivisionError), computing("cpu"):
        _ = 1 // 0


# ---- allocation_bandwidth --------------------------------------------------------------------------------------


def test_supply_is_measured_in_every_way_and_need_is_modelled(bandwidth):
    summary = bandwidth
    assert list(summary.columns) == COLUMNS
    supply = summary[summary.quantity == "allocation_bandwidth"]
    assert set(supply.panel) == {"one by one, 1 x cpu", "in runs, 1 x cpu", "cold, 1 x cpu"}
    assert set(supply.system) == {"64KB", "2MB"}
    assert set(zip(supply.clock, supply.evidence, strict=True)) == {("measured", "measured")}
    assert (supply.value > 0).all()
    need = summary[summary.figure == "fig4"]
    assert set(zip(need.clock, need.device, need.evidence, strict=True)) == {("modelled", "a100-80gb", "predicted")}
    assert len(published(need)) == len(need) == 3 * 6 * 2
    assert len(published(supply)) == 0


def test_need_is_throughput_times_bytes_per_token():
    run = compose_run(*BANDWIDTH, "params.need_batches=[64]")
    rows = need_rows(run, decode_need(run))
    table = pd.DataFrame([(r.model, r.quantity, r.value) for r in rows], columns=["model", "quantity", "value"])
    wide = table.pivot(index="model", columns="quantity", values="value")
    kib = 1024 * wide.kv_allocation_rate_vs_batch / wide.decode_throughput_vs_batch
    assert kib.round(6).to_dict() == {"yi-6b": 64, "llama-3-8b": 128, "yi-34b": 240}  # vAttention section 4


def test_on_a_gpu_table_9_stands_beside_the_published_one(on_the_fake):
    overrides = ("params.page_groups=[2MB]", "params.need_models=[]")
    assert published(on_the_fake(*BANDWIDTH, *overrides)).empty, "4 MB are not mapped as a pool is"
    run = replace(compose_run(*BANDWIDTH, "params.pool=4GB"), device=DeviceConfig(name="cuda", kind="cuda"))
    ways = {(size, way): named(run, figure="table9", key=size, label=size, way=way)
            for size in ("2MB", "64KB") for way in ("one by one", "in runs")}  # fmt: skip
    assert [each for each, names in ways.items() if is_earned(names)] == [("2MB", "one by one")]
    names = ways["2MB", "one by one"]
    assert [names[key] for key in ("paper", "panel", "system", "setup")] == [
        "vattention", "TP-1", "2MB", "1 x nvidia-a100-sxm4-80gb",
    ]  # fmt: skip


NEED = ("params.need_models=[yi-6b]", "params.need_batches=[64]")


@pytest.mark.parametrize("change", ["params.need_engine=lean", "params.need_context=2048"])
def test_need_that_is_modelled_otherwise_is_not_fig_4(change):
    run = compose_run(*BANDWIDTH, *NEED)
    assert {r.paper for r in need_rows(run, decode_need(run))} == {"vattention"}
    run = compose_run(*BANDWIDTH, *NEED, change)
    assert {r.paper for r in need_rows(run, decode_need(run))} == {"kvarena"}


# ---- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("experiment", "override", "said"),
    [
        (LATENCY, "params.page_groups=[]", "name at least one"),
        (LATENCY, "params.page_groups=[64KB,65536]", "none twice"),
        (LATENCY, "params.page_groups=[large]", "not a size"),
        (LATENCY, "params.page_groups=[5KB]", "multiples of"),
        (LATENCY, "params.rounds=0", "params.rounds=0"),
        (LATENCY, "params.runs=[4,1]", "ascending"),
        (LATENCY, "params.created=[]", "at least 1"),
        (BANDWIDTH, "params.pool=3MB", "not a multiple"),
        (BANDWIDTH, "params.pool=1MB", "not a multiple"),
        (BANDWIDTH, "params.run_groups=0", "params.run_groups=0"),
        (BANDWIDTH, "params.pool=1000GB", "memory are free"),
        (BANDWIDTH, "params.need_models=[gpt-5]", "no such model"),
        (BANDWIDTH, "params.need_device=cpu", "not a device model"),
        (BANDWIDTH, "params.need_device=tpu", "no such device"),
        (BANDWIDTH, "params.need_batches=[64,1]", "ascending"),
        (BANDWIDTH, "params.need_models=[yi-6b,yi-6b]", "named twice"),
        (BANDWIDTH, "params.need_device=h100", "was fitted on a100-80gb"),
    ],
)
def test_what_cannot_run_is_refused_with_a_name(experiment, override, said, tmp_path):
    with pytest.raises(UserError, match=said):
        written(compose_run(*experiment, override), tmp_path)


def test_the_pool_of_every_page_group_is_mapped_whole():
    pool = allocation_bandwidth._Pool("cpu", MB, 4)
    seen = []
    unmap = pool._driver.unmap
    pool._driver.unmap = lambda base, offset, count: (
        seen.append(pool._driver.mapped_bytes),
        unmap(base, offset, count),
    )
    pool.map_seconds(3)
    pool.close()
    assert seen == [4 * MB]
