"""Calibration: known constants are found again, files can be used, loads are what they say."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf

from kvarena.errors import UserError
from kvarena.experiments.command import compose
from kvarena.experiments.command.compose import compose_run
from kvarena.experiments.command.registry import own_rows
from kvarena.experiments.ours.step_fit import Fitted, Limits, device_of, fit, predicted_s, yaml_files
from kvarena.experiments.ours.timed_steps import decode_load, prefill_load
from kvarena.harness import config
from kvarena.harness.config import typed
from kvarena.harness.model.build import build_model
from kvarena.harness.modelled.device_model import DeviceConfig
from kvarena.harness.modelled.engine_config import EngineConfig
from kvarena.harness.paths import CONF
from kvarena.harness.run.run import Run

LIMITS = Limits(read_gb_per_s=20.0, tflop_per_s=0.05)
TINY = (
    "device=cpu", "model=tiny-llama", "arrival.rate=100", "arrival.duration_s=0.1", "trace.max_tokens=64",
    "params.batch_sizes=[1,2,3]", "params.contexts=[8,20,40]", "params.prompts=[4,9,30]", "params.pool_bytes=1048576",
    "params.rounds=2", "params.steps_per_round=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def run() -> Run:
    return compose_run("experiment=calibrate", *TINY)


def synthetic(engine: EngineConfig, run: Run) -> pd.DataFrame:
    """Loads whose measured time is what the engine's model says."""
    decodes = [(b, b, b * c, 0) for b in (1, 2, 4, 8, 16, 32) for c in (64, 512, 2048)]
    prompts = [(t, 0, 0, t * (t + 1) // 2) for t in (4, 16, 64, 256, 1024)]
    table = pd.DataFrame(decodes + prompts, columns=["tokens", "decodes", "context", "pairs"])
    return table.assign(step_s=predicted_s(Fitted(device_of(LIMITS, "x"), engine), run.model, table))


def test_constants_are_found_again() -> None:
    run = compose_run("experiment=calibrate", "device=cpu")  # a model whose step is more than its host's
    engine = EngineConfig("x", False, 800.0, 25.0, weights_efficiency=0.4, kv_efficiency=0.3, flop_efficiency=0.7)
    steps = synthetic(engine, run)
    found = fit(steps, LIMITS, run.model, "x").engine
    for key in ("host_step_us", "host_sequence_us", "weights_efficiency", "kv_efficiency", "flop_efficiency"):
        assert getattr(found, key) == pytest.approx(getattr(engine, key), rel=0.02), key
    assert not found.overlaps_host


def test_nothing_is_faster_than_the_machine(run: Run) -> None:
    fast = synthetic(EngineConfig("x", False, 100.0), run).assign(step_s=lambda t: t.step_s / 3)
    engine = fit(fast, LIMITS, run.model, "x").engine
    assert max(engine.weights_efficiency, engine.kv_efficiency, engine.flop_efficiency) <= 1


def test_fitted_files_are_a_device_and_an_engine(run: Run) -> None:
    engine = EngineConfig("mine", False, 10.0, 1.0, 0.5, 0.25, 0.75)
    fitted = Fitted(device_of(LIMITS, "mine"), engine)
    files = yaml_files(fitted)
    assert set(files) == {"device.yaml", "engine.yaml"}
    read = {name: OmegaConf.create(text) for name, text in files.items()}
    assert typed(EngineConfig, read["engine.yaml"], "engine") == engine
    assert typed(DeviceConfig, read["device.yaml"], "device") == fitted.device
    assert "conf/device/mine.yaml" in files["device.yaml"]
    assert fitted.device.need("memory_gib") > 0.1
    with pytest.raises(UserError, match="copy_in_us"):
        fitted.device.need("copy_in_us")


def test_the_written_files_run_on_this_machine_and_are_refused_elsewhere(
    finished: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished("calibrate", *TINY)
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf)
    for kind in ("device", "engine"):
        shutil.copy(folder / f"{kind}.yaml", conf / kind / "this-machine.yaml")
    for module in (config, compose):
        monkeypatch.setattr(module, "CONF", conf)
    here = ("device=this-machine", "engine=this-machine", "model=tiny-llama", "systems=[paged]", "arrival.rate=100",
            "arrival.duration_s=0.1", "trace.max_tokens=64", "params.pool_bytes=1048576", "params.seeds=[0]",
            "params.window_s=[0,100]")  # fmt: skip
    summary = own_rows(pd.read_csv(finished("memory_waste", *here) / "summary.csv"))
    assert set(summary.device) == set(summary.kernel) == {"this-machine"}
    for other in ("device=a100-40gb", "model=tiny-opt"):
        with pytest.raises(UserError, match="engine=this-machine "):
            finished("memory_waste", *here, other)


def test_a_decode_load_grows_by_a_token_per_sequence_and_step(run: Run) -> None:
    load = decode_load(run, run.systems[0], build_model(run.model, "cpu"), batch=3, context=20, steps=4)
    try:
        steps = [load.sample() for _ in range(4)]
    finally:
        load.close()
    assert [step.context for step in steps] == [63, 66, 69, 72]
    assert {(step.tokens, step.decodes, step.pairs) for step in steps} == {(3, 3, 0)}
    for step in steps:
        assert min(step.host_s, step.append_s, step.attention_s, step.projections_s) > 0
        assert step.host_s + step.append_s + step.attention_s + step.projections_s == pytest.approx(step.step_s)


def test_a_prefill_load_is_one_whole_prompt_every_time(run: Run) -> None:
    load = prefill_load(run, run.systems[0], build_model(run.model, "cpu"), tokens=30)
    try:
        steps = [load.sample() for _ in range(3)]
    finally:
        load.close()
    assert {(step.tokens, step.decodes, step.context, step.pairs) for step in steps} == {(30, 0, 0, 465)}
    assert all(step.projections_s > 0 for step in steps)


def test_a_run_reports_fitted_and_held_out_apart_and_writes_the_models(finished: Callable[..., Path]) -> None:
    folder = finished("calibrate", *TINY)
    assert (folder / "device.yaml").is_file()
    assert "host_step_us" in (folder / "engine.yaml").read_text()
    summary = pd.read_csv(folder / "summary.csv")
    steps = summary[summary.quantity.isin(["step_time_vs_context", "step_time_vs_prompt"])]
    modelled = steps[steps.clock == "modelled"]
    assert len(steps) == 2 * len(modelled) == 2 * (3 * 3 + 3)
    assert modelled.evidence.value_counts().to_dict() == {"calibrated": 7, "predicted": 5}
    assert set(modelled.device) == {"this-machine"}
    errors = summary[summary.quantity.str.startswith("step_time_rms_log_error:")]
    assert set(errors.quantity.str.partition(":")[2]) == {"fitted", "held_out"}
    replays = pd.read_parquet(folder / "replays.parquet")
    replays = replays.merge(
        pd.read_parquet(folder / "modelled_replays.parquet"), on="system", suffixes=("", "_modelled")
    )
    assert not {"requests.parquet", "steps.parquet"} & {path.name for path in folder.iterdir()}, (
        "none of their rows are"
    )
    rows = summary[summary.quantity == "modelled_over_measured:e2el_mean"]
    assert list(rows.n) == [2, 2]
    for system, value in zip(("paged", "orca-oracle"), rows.value, strict=True):
        here = replays[replays.system == system]
        assert value == pytest.approx(np.median(here.e2el_mean_s_modelled / here.e2el_mean_s))
    assert set(rows.evidence) == {"predicted"}
    assert summary[summary.quantity == "kv_read_bandwidth_vs_context"].value.gt(0).all()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("params.batch_sizes=[1,2]", "at least 3"),
        ("params.prompts=[4,4,8]", "none twice"),
        ("params.contexts=[8,20,100000]", "leave"),
        ("params.rounds=0", "at least 1"),
        ("systems=[orca-oracle]", "must be one with allocator paged"),
        ("model.num_layers=3", "another num_layers"),
    ],
)
def test_what_cannot_be_is_refused(override: str, said: str, finished: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=said):
        finished("calibrate", *TINY, override)


def test_a_gpu_is_not_fitted_yet(run: Run) -> None:
    from kvarena.experiments.ours.calibrate import _check

    with pytest.raises(UserError, match="device=cpu"):
        _check(replace(run, device=DeviceConfig("cuda", "cuda")))
